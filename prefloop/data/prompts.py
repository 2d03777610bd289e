"""The prompts of a run: rows of files, data sets or the embedded set, each checked as it is read."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator, model_validator

from prefloop.config import build, shown
from prefloop.data.entries import Placed, Tally, read_entries
from prefloop.data.formats import FieldOptions
from prefloop.data.prompt_store import PromptStore
from prefloop.data.rows import EMBEDDED
from prefloop.data.seen import Seen
from prefloop.errors import DataError, counted
from prefloop.records import Prompt, derive_seed

Part: TypeAlias = Literal["train", "eval"]
CountTokens: TypeAlias = Callable[[str], int]

_Name: TypeAlias = Annotated[str, Field(min_length=1)]


class SourceOptions(FieldOptions):
    """One of several sources. Options that it leaves out have their defaults, not the values of the section `data`."""

    source: str = Field(min_length=1)
    """File, folder, data set on the hub, or "embedded:instructions"."""
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """What ids begin with and measures are called by; null: the source's name without its ending."""
    split: str | None = None
    """Split of a data set or folder; null: "train", of evaluation data "test"."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    take: int | None = Field(default=None, ge=1)
    """So many of its usable rows, drawn by the seed; null: all."""

    @property
    def title(self) -> str:
        """Its name."""
        return self.name or Path(self.source).name.partition(".")[0] or self.source


class TrainSource(SourceOptions):
    """One of several sources to train on."""

    weight: float | None = Field(default=None, gt=0.0)
    """Share among the sources that have a weight: as many rows as there can be without taking one twice."""

    @model_validator(mode="after")
    def _one_amount(self) -> TrainSource:
        if self.weight is not None and self.take is not None:
            raise ValueError("weight and take exclude each other; set one of them")
        return self


class DataOptions(FieldOptions):
    """The recipe's section `data`.

    A source is a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; also .gz, .zst), a folder (written by
    `save_to_disk`, or holding data files), a data set on the Hugging Face hub ("owner/name"), or
    "embedded:instructions". docs/data.md shows what rows may look like. Formats and columns named here hold
    for sources that are a text; a source in a list names its own.
    """

    train: _Name | tuple[TrainSource, ...] = EMBEDDED
    """Source of the prompts to train on, or a list of {source, weight or take, fields}."""
    eval: _Name | tuple[SourceOptions, ...] | None = None
    """Source of the evaluation prompts, or a list of {name, source, fields}. null: `holdout` of `train`; else the embedded set's own, or none."""
    holdout: int = Field(default=0, ge=0)
    """Prompts drawn from `train` by the run's seed and kept for evaluation, where `eval` is null."""
    split: str = "train"
    """Split of `train`, where it is a data set or folder; slices such as "train[:1000]" work on the hub's."""
    eval_split: str = "test"
    """Split of `eval`, where it is a data set or folder."""
    subset: str | None = None
    """Configuration name of a hub data set, for those that have several; holds for `train` and `eval`."""
    max_prompt_tokens: int = Field(default=512, ge=1)
    """Prompts with more tokens (all turns, without the chat template's own) are dropped and counted."""
    max_response_tokens: int = Field(default=512, ge=1)
    """Rows whose target, or labelled answer, has more tokens are dropped and counted, where the method trains on them."""
    limit: int | None = Field(default=None, ge=1)
    """Read only the first so many usable rows of `train`, in the file's order; null reads all."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _each_by_itself(cls, value: object, info: ValidationInfo) -> object:
        """Read a list's sources one by one, so that an error names the one that is wrong."""
        key = f"data.{info.field_name}"
        kind = TrainSource if info.field_name == "train" else SourceOptions
        if isinstance(value, list | tuple):
            given = ({"source": one} if isinstance(one, str) else one for one in value)
            return tuple(
                one if isinstance(one, kind) else build(kind, one, f"{key}[{number}]")
                for number, one in enumerate(given)
            )
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{key} should be a source, or a list of {{source, ...}}; it is {shown(value)}"
            )
        return value

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DataOptions:
        if self.eval is not None and self.holdout:
            raise ValueError("data.holdout and data.eval exclude each other; set one of them")
        if self.limit is not None and not isinstance(self.train, str):
            raise ValueError("data.limit is for one source; say take in each source of data.train")
        parts: tuple[Part, Part] = ("train", "eval")
        for part in parts:
            if (self.train if part == "train" else self.eval) == ():
                raise ValueError(f"data.{part} is an empty list; name a source")
            names = [source.title for source in self.sources(part)]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(
                    f"data.{part} has two sources {twice[0]!r}; give each its own name"
                )
        return self

    def sources(self, part: Part) -> tuple[SourceOptions, ...]:
        """The sources of one part, each with its own options; () where there is none."""
        given = self.train if part == "train" else self.eval
        if given is None:
            return ()
        return (self.source(given, part),) if isinstance(given, str) else given

    def source(self, name: str, part: Part) -> SourceOptions:
        """A source that is a text, read by this section's options."""
        fields = {key: getattr(self, key) for key in FieldOptions.model_fields}
        split = self.split if part == "train" else self.eval_split
        return SourceOptions(source=name, split=split, subset=self.subset, **fields)

    def is_listed(self, part: Part) -> bool:
        """Whether the part is a list of sources, whose names then begin the ids."""
        return isinstance(self.train if part == "train" else self.eval, tuple)

    def eval_set_names(self) -> list[str]:
        """Names of the evaluation sets, where there are several to be measured apart."""
        return [one.title for one in self.sources("eval")] if self.is_listed("eval") else []


@dataclass(frozen=True)
class LoadedData:
    """The prompts of a run, and how many rows were left out for which reason."""

    train: PromptStore
    eval: PromptStore
    dropped: dict[str, int]
    """Reason -> rows; reasons of the evaluation source begin with "eval: "."""
    eval_sets: dict[str, range] = field(default_factory=dict)
    """Name -> its prompts' places in `eval`, where there are several evaluation sets."""
    notes: tuple[str, ...] = ()
    """How each source was read, what of it was ignored and what dropped."""


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
    loader = _Loader(options, needs_target, needs_pairs, seed, count_tokens, folder)
    train = loader.read_part("train")[0]
    held_out, sets = train[:0], dict[str, range]()
    if options.eval is not None:
        held_out, sets = loader.read_part("eval")
    elif options.holdout:
        rest, held_out = _hold_out(train, options.holdout, seed)
        loader.dropped["copy of a held-out prompt"] = len(train) - len(rest) - len(held_out)
        train = rest
    elif options.train == EMBEDDED:
        held_out = loader.read(options.source(EMBEDDED, "eval"), "eval")
    return LoadedData(train, held_out, dict(+loader.dropped), sets, tuple(loader.notes))


class _Loader:
    """Reads the sources of a run one by one and counts what is left out."""

    def __init__(
        self,
        options: DataOptions,
        needs_target: bool,
        needs_pairs: bool,
        seed: int,
        count_tokens: CountTokens | None,
        folder: Path | None,
    ) -> None:
        self._options = options
        self._needs_target, self._needs_pairs = needs_target, needs_pairs
        self._seed, self._count, self._folder = seed, count_tokens, folder
        self.dropped: Counter[str] = Counter()
        self.notes: list[str] = []

    def read_part(self, part: Part) -> tuple[PromptStore, dict[str, range]]:
        """All sources of a part as one store, and the range of each in it, if they are a list."""
        sources = self._options.sources(part)
        if not self._options.is_listed(part):
            limit = self._options.limit if part == "train" else None
            return self.read(sources[0], part, limit), {}
        stores = [self.read(source, part) for source in sources]
        counts = amounts(sources, [len(store) for store in stores])
        drawn = [
            _renamed(_drawn(store, amount, self._seed, source.title), source.title)
            for source, store, amount in zip(sources, stores, counts, strict=True)
        ]
        places, start = {}, 0
        for source, amount in zip(sources, counts, strict=True):
            places[source.title] = range(start, start + amount)
            start += amount
        return PromptStore(chain.from_iterable(drawn), self._folder), places

    def read(self, source: SourceOptions, part: Part, limit: int | None = None) -> PromptStore:
        """The usable prompts of one source."""
        tally = Tally()

        def fits(prompt: Prompt) -> bool:
            reason = _too_long(prompt, self._options, self._needs_target, self._count)
            if reason:
                tally.drop(reason, prompt.id)
            return reason is None

        rows = read_prompts(
            source,
            self._options,
            part=part,
            needs_target=self._needs_target,
            needs_pairs=self._needs_pairs,
            tally=tally,
        )
        prompts = PromptStore(islice(filter(fits, rows), limit), self._folder)
        self.notes += tally.lines()
        for reason, count in tally.dropped.items():
            self.dropped[reason if part == "train" else f"eval: {reason}"] += count
        if not prompts:
            raise DataError(nothing_left(tally))
        return prompts


def nothing_left(tally: Tally) -> str:
    """What to say of a source none of whose rows can be used."""
    if all(reason.endswith("too long") for reason in tally.dropped):
        return f"every row of {tally.source} is too long; raise data.max_*_tokens"
    return f"no row of {tally.source} can be used ({tally.reasons}); give rows that can"


def amounts(sources: Sequence[SourceOptions], there: Sequence[int]) -> list[int]:
    """Rows of each source: all, `take`, or by weight as many as the scarcest weighted source allows."""
    weights = [getattr(source, "weight", None) for source in sources]
    unit = min((count / w for w, count in zip(weights, there, strict=True) if w), default=0.0)
    rows = []
    for source, weight, count in zip(sources, weights, there, strict=True):
        amount = source.take or (max(1, round(unit * weight)) if weight else count)
        if amount > count:
            raise DataError(
                f"{source.source} has {count} usable rows, and take is {amount}; lower it"
            )
        rows.append(amount)
    return rows


def _drawn(store: PromptStore, amount: int, seed: int, name: str) -> PromptStore:
    if amount == len(store):
        return store
    chosen = Random(derive_seed(seed, "mixture", name)).sample(range(len(store)), amount)
    return store.picked(sorted(chosen))


def _renamed(prompts: Iterable[Prompt], name: str) -> Iterator[Prompt]:
    return (prompt.model_copy(update={"id": f"{name}:{prompt.id}"}) for prompt in prompts)


def read_prompts(
    source: str | SourceOptions,
    options: DataOptions,
    *,
    part: Part = "train",
    needs_target: bool = False,
    needs_pairs: bool = False,
    tally: Tally | None = None,
) -> Iterator[Prompt]:
    """Stream the prompts of one source; DataError names the file and line of the first bad row.

    A source that is a text is read by `options`; `part` says which split of a data set is meant. `tally`
    counts the rows and notes how they were read, and why one cannot be used.
    """
    if isinstance(source, str):
        source = options.source(source, part)
    tally = Tally() if tally is None else tally
    if needs_pairs and part == "train" and source.source == EMBEDDED:
        raise DataError(
            f"{EMBEDDED} has no labelled pairs, which this method trains on; name a file with prompt, "
            "chosen and rejected in data.train"
        )

    def read(tally: Tally) -> Iterator[Placed]:
        return read_entries(
            source.source,
            source,
            part=part,
            subset=source.subset,
            split=source.split or {"train": "train", "eval": "test"}[part],
            pairs=needs_pairs,
            tally=tally,
        )

    entries = read(tally)
    seen = Seen()
    for placed in entries if needs_pairs else _without_repeats(entries):
        wants_pair = needs_pairs and (part == "train" or placed.entry.chosen is not None)
        prompt = _prompt(placed, needs_target=needs_target, wants_pair=wants_pair)
        if isinstance(prompt, str):
            tally.drop(prompt, placed.where)
            continue
        if not seen.add(hash(prompt.id)):
            # Two ids may have one hash, so the rows are read again to see which was first.
            first = next(one.where for one in read(Tally()) if one.id == prompt.id)
            if first != placed.where:
                raise DataError(
                    f"{placed.where} repeats the id {prompt.id!r} of {first}; name a column of "
                    "unique ids in data.id_field, or set it to null to number the rows"
                )
        yield prompt


def _without_repeats(entries: Iterable[Placed]) -> Iterator[Placed]:
    """The entries without those of a row that differ in the worse answer only, where no pairs are wanted."""
    where, targets = "", set[str | None]()
    for placed in entries:
        if placed.where != where:
            where, targets = placed.where, set()
        if placed.entry.target not in targets:
            targets.add(placed.entry.target)
            yield placed


def _prompt(placed: Placed, *, needs_target: bool, wants_pair: bool) -> Prompt | str:
    """An entry as the method needs it, or why it cannot be used. Raises DataError where answers are missing."""
    entry = placed.entry
    if wants_pair and entry.chosen is None and not entry.flaw:
        raise DataError(placed.without_pair)
    if wants_pair and (entry.flaw or entry.tie):
        return entry.flaw or "tie"
    if needs_target and entry.target is None:
        if entry.flaw or entry.tie:
            return entry.flaw or "tie"
        raise DataError(
            f"{placed.where} has no target response, which this run needs for every prompt; name its "
            "column in data.response_field, or end the messages with an assistant turn"
        )
    pair = (entry.chosen, entry.rejected) if wants_pair else (None, None)
    return Prompt(
        id=placed.id,
        messages=entry.messages,
        target=entry.target,
        chosen=pair[0],
        rejected=pair[1],
    )


def round_subset(count: int, *, round: int, size: int, seed: int) -> Sequence[int]:
    """Which `size` of `count` prompts one round (from 0) takes; pure, so that any round can be drawn by itself.

    Rounds walk through a seeded permutation of all prompts, then through the next one, so that each
    prompt comes once before any comes twice. A round that crosses from one permutation to the next
    takes prompts that it does not hold yet. DataError unless 1 <= size <= count.
    """
    if not 1 <= size <= count:
        raise DataError(
            f"a round of {counted(size, 'prompt')} cannot be drawn from {count}; set "
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
    distinct = set[int]()
    for prompt in prompts:
        distinct.add(hash(prompt.messages))
        if len(distinct) > count:
            break
    else:
        raise DataError(f"data.holdout is {count} of {len(distinct)} different prompts; lower it")
    drawn = set(Random(derive_seed(seed, "holdout")).sample(range(len(prompts)), count))
    held_out = prompts.picked(sorted(drawn))
    known = {prompt.messages for prompt in held_out}
    rest = (number for number, prompt in enumerate(prompts) if prompt.messages not in known)
    return prompts.picked(rest), held_out
