"""What people compare: two answers to each of the same prompts, from runs or from files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple, TypeAlias

from pydantic import Field

from prefloop.data.rows import Row, conversation, filled_text, is_data_file, open_rows
from prefloop.errors import DataError, RunFolderError
from prefloop.evaluate.answers import ANSWER
from prefloop.records import Candidates, Message, Record, derive_seed
from prefloop.run_folder import RoundDir, read_run

Side: TypeAlias = Literal["a", "b"]

_START = "start"


class Answered(NamedTuple):
    """A prompt with one side's answer."""

    id: str
    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True)
class Source:
    """All answers of one side."""

    name: str
    """As the report calls it, the round included: "runs/mine@2"."""
    answers: Mapping[tuple[Message, ...], Answered]
    """By conversation: the two sides need not have the same ids."""


@dataclass(frozen=True)
class Item:
    """Two answers to one prompt."""

    id: str
    messages: tuple[Message, ...]
    answers: Mapping[Side, str]


@dataclass(frozen=True)
class Comparison:
    """All that is to be compared."""

    names: Mapping[Side, str]
    items: Mapping[str, Item]
    """By id, in A's order; prompts with identical answers are left out."""
    identical: int
    """Prompts that both sides answer in the same words: nobody is asked about them."""

    @property
    def digest(self) -> str:
        """Equal for equal prompts and answers: votes on others are not votes on these."""
        found = sha256()
        for item in self.items.values():
            turns = [f"{turn.role}\x1f{turn.content}" for turn in item.messages]
            parts = [item.id, *turns, item.answers["a"], item.answers["b"]]
            found.update("\x1e".join([str(len(parts)), *parts, ""]).encode())
        return found.hexdigest()[:16]


def read_comparison(first: str, second: str) -> Comparison:
    """The answers of two sources to the same prompts; a source is RUN, RUN@ROUND or a file with rows.

    Raises DataError where the prompts differ, with counts, and where nothing is left to compare.
    """
    sides: dict[Side, Source] = {"a": read_source(first), "b": read_source(second)}
    a, b = sides["a"], sides["b"]
    if a.name == b.name:
        raise DataError(f"both sides are {a.name}; name two rounds (RUN@0 RUN@1), runs or files")
    only_a, only_b = a.answers.keys() - b.answers.keys(), b.answers.keys() - a.answers.keys()
    if only_a or only_b:
        raise DataError(
            f"{a.name} and {b.name} do not answer the same prompts: {len(a.answers) - len(only_a)} in both, "
            f"{len(only_a)} only in the first, {len(only_b)} only in the second; let both runs have the "
            "same held-out prompts, or write files with the prompts of both"
        )
    items = {
        found.id: Item(found.id, turns, {"a": found.answer, "b": b.answers[turns].answer})
        for turns, found in a.answers.items()
        if found.answer.split() != b.answers[turns].answer.split()
    }
    if not items:
        raise DataError(
            f"{a.name} and {b.name} answer every prompt in the same words; nothing is left to compare"
        )
    names: dict[Side, str] = {"a": a.name, "b": b.name}
    return Comparison(names, items, len(a.answers) - len(items))


def read_source(text: str) -> Source:
    """One side's answers. Raises DataError or RunFolderError with the place."""
    path, round_name = Path(text), None
    if not path.exists() and (named := re.fullmatch(rf"(.+)@(\d+|{_START})", text)):
        path, round_name = Path(named[1]), named[2]
    if path.is_dir():
        round_dir = _round(path, round_name)
        answers: Iterator[Answered] = _of_round(round_dir)
        name = f"{path}@{_name(round_dir)}"
    elif round_name is None and is_data_file(path):
        answers, name = _of_file(text), text
    else:
        raise DataError(
            f"{text} is neither a run's folder nor a file of answers; name RUN, RUN@ROUND or a .jsonl file "
            'with lines {"prompt": ..., "answer": ...}'
        )
    found: dict[tuple[Message, ...], Answered] = {}
    ids: set[str] = set()
    for answered in answers:
        if answered.messages in found or answered.id in ids:
            raise DataError(
                f"{name} answers the prompt {answered.id!r} twice; leave one answer a prompt"
            )
        found[answered.messages] = answered
        ids.add(answered.id)
    if not found:
        raise DataError(f"{name} holds no answers; name another round or file")
    return Source(name, found)


def _round(path: Path, name: str | None) -> RoundDir:
    """The round that was asked for, else the last one with held-out answers."""
    run = read_run(path)
    answered = [
        round_dir
        for round_dir in (RoundDir(path / "rounds" / _START, -1), *run.rounds())
        if round_dir.manifest("answers")
    ]
    if not answered:
        raise RunFolderError(
            f"{path} has no held-out answers yet; let it measure a round (evaluate.prompts above 0)"
        )
    if name is None:
        return answered[-1]
    number = -1 if name == _START else int(name)
    for round_dir in answered:
        if round_dir.number == number:
            return round_dir
    raise RunFolderError(
        f"{path} has no held-out answers of round {name}; it has: {', '.join(map(_name, answered))}"
    )


def _name(round_dir: RoundDir) -> str:
    return _START if round_dir.number < 0 else str(round_dir.number)


def _of_round(round_dir: RoundDir) -> Iterator[Answered]:
    for group in round_dir.stream("answers", Candidates):
        yield Answered(group.prompt.id, group.prompt.messages, group.responses[ANSWER].text)


def _of_file(source: str) -> Iterator[Answered]:
    stem, rows = open_rows(source, "eval", None, "train")
    for number, (where, row) in enumerate(rows, start=1):
        answer = row.get("answer")
        if not isinstance(answer, str) or answer.strip():
            answer = filled_text(where, "answer", answer)
        # else the model has said nothing, and that is an answer too
        given = row.get("id")
        name = f"{stem}-{number}" if given is None else filled_text(where, "id", str(given))
        yield Answered(name, tuple(_conversation(where, row)), answer)


def _conversation(where: str, row: Row) -> list[Message]:
    value = row.get("prompt")
    if not isinstance(value, list):
        return [Message(role="user", content=filled_text(where, "prompt", value))]
    turns = conversation(where, "prompt", value)
    if turns[-1].role != "user":
        raise DataError(f"{where}: 'prompt' ends with the assistant's turn; put it into 'answer'")
    return turns


class Plan(Record):
    """The options of a round of annotation, kept in the file of votes."""

    seed: int = 0
    """Draws the order of the items and the sides, for each annotator by name."""
    each: int | None = Field(default=None, ge=1)
    """Items that each annotator sees; None: all."""
    shared: int | None = Field(default=None, ge=0)
    """Of them, how many are the same for everybody, so that agreement can be told; None: a fifth of `each`."""

    def order(self, items: Sequence[str], annotator: str, number: int) -> list[str]:
        """The items of one annotator, in the order in which they are shown.

        `number` counts annotators from 0 as they came. All share the same first items of a seeded
        permutation; from the others each takes the stretch after the one before, round and round, so that
        every item has as many votes as any other, or one more.
        """
        drawn = list(items)
        Random(derive_seed(self.seed, "items")).shuffle(drawn)
        if self.each is not None and self.each < len(drawn):
            shared = self.each // 5 if self.shared is None else self.shared
            rest, own = drawn[shared:], self.each - shared
            stretch = [rest[(number * own + place) % len(rest)] for place in range(own)]
            drawn = [*drawn[:shared], *stretch]
        Random(derive_seed(self.seed, "order", annotator)).shuffle(drawn)
        return drawn

    def first(self, annotator: str, item: str) -> Side:
        """Whose answer is "Answer 1": on the left, or above where the page is narrow."""
        return "b" if derive_seed(self.seed, "side", annotator, item) % 2 else "a"


def make_plan(seed: int, each: int | None, shared: int | None) -> Plan:
    """A plan from the options of the command line. Raises DataError where they contradict each other."""
    if shared is not None and (each is None or shared > each):
        raise DataError(
            f"--shared {shared} needs --each with at least that number; without --each everybody sees "
            "all items"
        )
    return Plan(seed=seed, each=each, shared=shared)
