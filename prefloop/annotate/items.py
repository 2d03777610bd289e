"""The items of an annotation: two answers to each prompt, from runs or from files."""

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


class PromptAnswer(NamedTuple):
    """A prompt with the answer of one side."""

    id: str
    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True)
class AnswerSource:
    """All answers of one side."""

    name: str
    """The side's name in the report, with its round: "runs/mine@2"."""
    answers: Mapping[tuple[Message, ...], PromptAnswer]
    """Conversation -> answer; prompts are matched by text, as ids may differ."""


@dataclass(frozen=True)
class Item:
    """Two answers to one prompt."""

    id: str
    messages: tuple[Message, ...]
    answers: Mapping[Side, str]


@dataclass(frozen=True)
class Comparison:
    """The two sides' names and all items."""

    names: Mapping[Side, str]
    items: Mapping[str, Item]
    """Id -> item, in A's order; prompts with identical answers are left out."""
    identical: int
    """Number of prompts that both sides answer in the same words; they are not shown."""

    @property
    def digest(self) -> str:
        """A hash of prompts and answers, by which a file of votes is matched to its comparison."""
        hasher = sha256()
        for item in self.items.values():
            turns = [f"{turn.role}\x1f{turn.content}" for turn in item.messages]
            parts = [item.id, *turns, item.answers["a"], item.answers["b"]]
            hasher.update("\x1e".join([str(len(parts)), *parts, ""]).encode())
        return hasher.hexdigest()[:16]


def read_comparison(first: str, second: str) -> Comparison:
    """The answers of two sources to the same prompts; a source is RUN, RUN@ROUND or a file of rows.

    Raises DataError, with counts, where the prompts differ, and where no item is left to compare.
    """
    sides: dict[Side, AnswerSource] = {"a": read_source(first), "b": read_source(second)}
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
        answered.id: Item(answered.id, turns, {"a": answered.answer, "b": b.answers[turns].answer})
        for turns, answered in a.answers.items()
        if answered.answer.split() != b.answers[turns].answer.split()
    }
    if not items:
        raise DataError(
            f"{a.name} and {b.name} answer every prompt in the same words; nothing is left to compare"
        )
    names: dict[Side, str] = {"a": a.name, "b": b.name}
    return Comparison(names, items, len(a.answers) - len(items))


def read_source(text: str) -> AnswerSource:
    """One side's answers. Raises DataError or RunFolderError, naming the file and line."""
    path, round_name = Path(text), None
    if not path.exists() and (named := re.fullmatch(rf"(.+)@(\d+|{_START})", text)):
        path, round_name = Path(named[1]), named[2]
    if path.is_dir():
        round_dir = _round(path, round_name)
        answers: Iterator[PromptAnswer] = _answers_of_round(round_dir)
        name = f"{path}@{_name(round_dir)}"
    elif round_name is None and is_data_file(path):
        answers, name = _answers_of_file(text), text
    else:
        raise DataError(
            f"{text} is neither a run's folder nor a file of answers; name RUN, RUN@ROUND or a .jsonl file "
            'with lines {"prompt": ..., "answer": ...}'
        )
    answers_by_conversation: dict[tuple[Message, ...], PromptAnswer] = {}
    ids: set[str] = set()
    for answered in answers:
        if answered.messages in answers_by_conversation or answered.id in ids:
            raise DataError(
                f"{name} answers the prompt {answered.id!r} twice; leave one answer a prompt"
            )
        answers_by_conversation[answered.messages] = answered
        ids.add(answered.id)
    if not answers_by_conversation:
        raise DataError(f"{name} holds no answers; name another round or file")
    return AnswerSource(name, answers_by_conversation)


def _round(path: Path, name: str | None) -> RoundDir:
    """The named round, else the last one with held-out answers."""
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


def _answers_of_round(round_dir: RoundDir) -> Iterator[PromptAnswer]:
    for group in round_dir.stream("answers", Candidates):
        yield PromptAnswer(group.prompt.id, group.prompt.messages, group.responses[ANSWER].text)


def _answers_of_file(source: str) -> Iterator[PromptAnswer]:
    name_prefix, rows = open_rows(source, "eval", None, "train")
    for number, (where, row) in enumerate(rows, start=1):
        answer = row.get("answer")
        if not isinstance(answer, str) or answer.strip():
            answer = filled_text(where, "answer", answer)
        # An empty answer is allowed: the model said nothing.
        row_id = row.get("id")
        name = (
            f"{name_prefix}-{number}" if row_id is None else filled_text(where, "id", str(row_id))
        )
        yield PromptAnswer(name, tuple(_conversation(where, row)), answer)


def _conversation(where: str, row: Row) -> list[Message]:
    value = row.get("prompt")
    if not isinstance(value, list):
        return [Message(role="user", content=filled_text(where, "prompt", value))]
    turns = conversation(where, "prompt", value)
    if turns[-1].role != "user":
        raise DataError(f"{where}: 'prompt' ends with the assistant's turn; put it into 'answer'")
    return turns


class AnnotationPlan(Record):
    """The options of an annotation, stored in the file of votes."""

    seed: int = 0
    """Seed of each annotator's order of items and of sides."""
    each: int | None = Field(default=None, ge=1)
    """Items that each annotator sees; None: all."""
    shared: int | None = Field(default=None, ge=0)
    """How many of them all annotators see, to measure agreement; None: a fifth of `each`."""

    def order(self, items: Sequence[str], annotator: str, number: int) -> list[str]:
        """The items of one annotator, in the order in which they are shown.

        `number` counts annotators from 0 in the order of joining. All get the same first items of a seeded
        permutation; of the others each gets the next ones, cyclically, so that the items' numbers of votes differ
        by one at most.
        """
        order = list(items)
        Random(derive_seed(self.seed, "items")).shuffle(order)
        if self.each is not None and self.each < len(order):
            shared = self.each // 5 if self.shared is None else self.shared
            individual, own_count = order[shared:], self.each - shared
            own_items = [
                individual[(number * own_count + index) % len(individual)]
                for index in range(own_count)
            ]
            order = [*order[:shared], *own_items]
        Random(derive_seed(self.seed, "order", annotator)).shuffle(order)
        return order

    def first(self, annotator: str, item: str) -> Side:
        """The side that is shown as "Answer 1": on the left, or above where the page is narrow."""
        return "b" if derive_seed(self.seed, "side", annotator, item) % 2 else "a"


def make_plan(seed: int, each: int | None, shared: int | None) -> AnnotationPlan:
    """A plan from the options of the command line. Raises DataError where they contradict each other."""
    if shared is not None and (each is None or shared > each):
        raise DataError(
            f"--shared {shared} needs --each with at least that number; without --each everybody sees "
            "all items"
        )
    return AnnotationPlan(seed=seed, each=each, shared=shared)
