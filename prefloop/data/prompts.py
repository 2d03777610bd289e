"""The prompts of a run: rows of files, data sets or the embedded set, each checked as it is read."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from prefloop.config import Options
from prefloop.data.preferences import ANSWERS, preference
from prefloop.data.prompt_store import PromptStore
from prefloop.data.rows import EMBEDDED, Row, conversation, filled_text, open_rows
from prefloop.errors import DataError
from prefloop.records import Message, Prompt, derive_seed

Part: TypeAlias = Literal["train", "eval"]
CountTokens: TypeAlias = Callable[[str], int]


class DataOptions(Options):
    """The recipe's section `data`.

    A source is a file (.jsonl, .json, .csv, .parquet), a folder (written by `save_to_disk`, or holding
    data files), a data set on the Hugging Face hub ("owner/name"), or "embedded:instructions". Where a
    method trains on labelled pairs, rows with `chosen` and `rejected` are read as `read_preferences` does.
    """

    train: str = Field(default=EMBEDDED, min_length=1)
    """Source of the prompts to train on."""
    eval: str | None = Field(default=None, min_length=1)
    """Source of the evaluation prompts. null: `holdout` of `train`; else the embedded set's own, or none."""
    holdout: int = Field(default=0, ge=0)
    """Prompts drawn from `train` by the run's seed and kept for evaluation, where `eval` is null."""
    split: str = "train"
    """Split of `train`, where it is a data set or folder; slices such as "train[:1000]" work on the hub's."""
    eval_split: str = "test"
    """Split of `eval`, where it is a data set or folder."""
    subset: str | None = None
    """Configuration name of a hub data set, for those that have several; holds for `train` and `eval`."""
    prompt_field: str = "prompt"
    """Column with the prompt: a text, or a list of {role, content} turns."""
    input_field: str | None = None
    """Column with material that is put below the prompt after a blank line ("input" in Alpaca's format)."""
    response_field: str | None = "response"
    """Column with the target response: a text; null ignores responses."""
    messages_field: str | None = "messages"
    """Column with a whole conversation of {role, content} turns. Where a row has it, it comes before
    `prompt_field`, and a last assistant turn before `response_field`; null ignores the column."""
    id_field: str | None = "id"
    """Column with unique ids; rows without one are numbered. null numbers all rows."""
    max_prompt_tokens: int = Field(default=512, ge=1)
    """Prompts with more tokens (all turns, without the chat template's own) are dropped and counted."""
    max_response_tokens: int = Field(default=512, ge=1)
    """Rows whose target, or labelled answer, has more tokens are dropped and counted, where the method trains on them."""
    limit: int | None = Field(default=None, ge=1)
    """Read only the first so many usable rows of `train`, in the file's order; null reads all."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DataOptions:
        if self.eval is not None and self.holdout:
            raise ValueError("data.holdout and data.eval exclude each other; set one of them")
        return self


@dataclass(frozen=True)
class LoadedData:
    """The prompts of a run, and how many rows were left out for which reason."""

    train: PromptStore
    eval: PromptStore
    dropped: dict[str, int]
    """Reason -> rows; reasons of the evaluation source begin with "eval: "."""


def load_data(
    options: DataOptions,
    *,
    needs_target: bool,
    needs_pairs: bool = False,
    seed: int,
    count_tokens: CountTokens | None,
    folder: Path | None = None,
) -> LoadedData:
    """All prompts of a run, kept in a nameless file of `folder`. Without `count_tokens` no length is checked.

    With `needs_pairs` every training row is a labelled pair; evaluation rows may be.
    With `holdout`, copies of a held-out conversation leave the training prompts too and are counted.
    Raises DataError where a row is malformed or no row fits the length limits.
    """
    dropped: Counter[str] = Counter()

    def read(source: str, part: Part, limit: int | None = None) -> PromptStore:
        def drop(reason: str) -> None:
            dropped[reason if part == "train" else f"eval: {reason}"] += 1

        def fits(prompt: Prompt) -> bool:
            reason = _too_long(prompt, options, needs_target, count_tokens)
            if reason:
                drop(reason)
            return reason is None

        rows = read_prompts(
            source,
            options,
            part=part,
            needs_target=needs_target,
            needs_pairs=needs_pairs,
            drop=drop,
        )
        prompts = PromptStore(islice(filter(fits, rows), limit), folder)
        if not prompts:
            raise DataError(f"every row of {source} is too long; raise data.max_*_tokens")
        return prompts

    train = read(options.train, "train", options.limit)
    held_out = train[:0]
    if options.eval is not None:
        held_out = read(options.eval, "eval")
    elif options.holdout:
        rest, held_out = _hold_out(train, options.holdout, seed)
        dropped["copy of a held-out prompt"] = len(train) - len(rest) - len(held_out)
        train = rest
    elif options.train == EMBEDDED:
        held_out = read(EMBEDDED, "eval")
    return LoadedData(train, held_out, dict(+dropped))


def read_prompts(
    source: str,
    options: DataOptions,
    *,
    part: Part = "train",
    needs_target: bool = False,
    needs_pairs: bool = False,
    drop: Callable[[str], None] = lambda reason: None,
) -> Iterator[Prompt]:
    """Stream the prompts of one source; DataError names the file and line of the first bad row.

    `part` says which split of a data set is meant: `options.split` or `options.eval_split`. With
    `needs_pairs`, `drop` is told why a labelled row cannot be used.
    """
    if needs_pairs and part == "train" and source == EMBEDDED:
        raise DataError(
            f"{EMBEDDED} has no labelled pairs, which this method trains on; name a file with prompt, "
            "chosen and rejected in data.train"
        )
    split = options.split if part == "train" else options.eval_split
    stem, rows = open_rows(source, part, options.subset, split)
    if source == EMBEDDED:
        options = DataOptions()
    first_use: dict[str, int] = {}
    for number, (where, row) in enumerate(rows, start=1):
        labelled = needs_pairs and (part == "train" or any(name in row for name in ANSWERS[0]))
        read = _labelled if labelled else _prompt
        prompt = read(where, row, options, f"{stem}-{number}")
        if isinstance(prompt, str):
            drop(prompt)
            continue
        if needs_target and prompt.target is None:
            raise DataError(
                f"{where} has no target response, which this run needs for every prompt; name its "
                "column in data.response_field, or end the messages with an assistant turn"
            )
        if prompt.id in first_use:
            raise DataError(
                f"{where} repeats the id {prompt.id!r} of row {first_use[prompt.id]}; name a column of "
                "unique ids in data.id_field, or set it to null to number the rows"
            )
        first_use[prompt.id] = number
        yield prompt
    if not first_use:
        raise DataError(f"{source} holds no rows; name a source with prompts in data.{part}")


def round_subset(count: int, *, round: int, size: int, seed: int) -> Sequence[int]:
    """Which `size` of `count` prompts one round (from 0) takes; pure, so that any round can be drawn by itself.

    Rounds walk through a seeded permutation of all prompts, then through the next one, so that each
    prompt comes once before any comes twice. A round that crosses from one permutation to the next
    takes prompts that it does not hold yet. DataError unless 1 <= size <= count.
    """
    if not 1 <= size <= count:
        raise DataError(
            f"a round of {size} prompts cannot be drawn from {count}; set "
            "loop.prompts_per_round to at most that, or give more data"
        )
    assert round >= 0
    tail = array("Q")
    done = epoch = 0
    while True:
        order = array("Q", range(count))
        Random(derive_seed(seed, "prompts", epoch)).shuffle(order)
        held = _marked(count, tail)
        lead = array("Q", islice((i for i in order if not held[i]), size - len(tail)))
        led = _marked(count, lead)
        walk = tail + lead + array("Q", (i for i in order if not led[i]))
        rounds = len(walk) // size
        if round < done + rounds:
            start = (round - done) * size
            return walk[start : start + size]
        tail = walk[rounds * size :]
        done += rounds
        epoch += 1


def _marked(count: int, chosen: Iterable[int]) -> bytearray:
    """A set of small numbers at a byte each."""
    marks = bytearray(count)
    for index in chosen:
        marks[index] = 1
    return marks


def _too_long(
    prompt: Prompt, options: DataOptions, needs_target: bool, count: CountTokens | None
) -> str | None:
    if count is None:
        return None
    if sum(count(turn.content) for turn in prompt.messages) > options.max_prompt_tokens:
        return "prompt too long"
    answers = (prompt.target if needs_target else None, prompt.chosen, prompt.rejected)
    if any(answer and count(answer) > options.max_response_tokens for answer in answers):
        return "response too long"
    return None


def _hold_out(prompts: PromptStore, count: int, seed: int) -> tuple[PromptStore, PromptStore]:
    """Draw `count` prompts by seed; the others, without copies of the drawn, and the drawn."""
    distinct = len({hash(prompt.messages) for prompt in prompts})
    if count >= distinct:
        raise DataError(f"data.holdout is {count} of {distinct} different prompts; lower it")
    drawn = set(Random(derive_seed(seed, "holdout")).sample(range(len(prompts)), count))
    held_out = prompts.picked(sorted(drawn))
    known = {prompt.messages for prompt in held_out}
    rest = (number for number, prompt in enumerate(prompts) if prompt.messages not in known)
    return prompts.picked(rest), held_out


# Rows to prompts


def _prompt(where: str, row: Row, options: DataOptions, default_id: str) -> Prompt:
    turns = _turns(where, row, options)
    answered = turns[-1].role == "assistant"
    answer = turns.pop().content if answered else _cell(row, options.response_field)
    target = None if answer is None else filled_text(where, options.response_field or "", answer)
    identity = _identity(where, row, options, default_id)
    return Prompt(id=identity, messages=tuple(turns), target=target)


def _labelled(where: str, row: Row, options: DataOptions, default_id: str) -> Prompt | str:
    """A labelled pair as a prompt with its two answers, or why it is none."""
    found = preference(where, row, default_id, default_id, None)
    if isinstance(found, str):
        return found
    if found.tie:
        return "tie"
    answer = _cell(row, options.response_field)
    return Prompt(
        id=_identity(where, row, options, default_id),
        messages=found.messages,
        # Where the data have no answer of their own, the chosen one is what a model should say.
        target=found.target or found.chosen
        if answer is None
        else filled_text(where, options.response_field or "", answer),
        chosen=found.chosen,
        rejected=found.rejected,
    )


def _identity(where: str, row: Row, options: DataOptions, default: str) -> str:
    given = _cell(row, options.id_field)
    identity = default if given is None else given
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise DataError(f"{where}: {options.id_field!r} must be a text or a whole number")
    return str(identity)


def _turns(where: str, row: Row, options: DataOptions) -> list[Message]:
    messages, field = _cell(row, options.messages_field), options.messages_field or ""
    prompt = _cell(row, options.prompt_field)
    if messages is None and isinstance(prompt, list):
        messages, field = prompt, options.prompt_field
    if messages is not None:
        return conversation(where, field, messages)
    if prompt is None:
        raise DataError(_missing(where, row, options))
    text = filled_text(where, options.prompt_field, prompt)
    extra = _cell(row, options.input_field)
    if extra is not None and extra != "":
        text = f"{text}\n\n{filled_text(where, options.input_field or '', extra)}"
    return [Message(role="user", content=text)]


def _cell(row: Row, field: str | None) -> object:
    return row.get(field) if field else None


def _missing(where: str, row: Row, options: DataOptions) -> str:
    wanted = [field for field in (options.prompt_field, options.messages_field) if field]
    needs = " or ".join(map(repr, wanted))
    if any(field in row for field in wanted):
        return f"{where}: {needs} is empty; fill it in or remove the row"
    found = ", ".join(repr(str(name)[:40]) for name in row) or "none"
    return (
        f"{where} has no {needs} (its columns: {found}); set data.prompt_field or data.messages_field "
        "(Alpaca's: prompt_field instruction, input_field input, response_field output)"
    )
