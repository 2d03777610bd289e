"""The cells of a row, whose reader leaves a trace, and the turns before an answer out of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from prefloop.data.files import Row
from prefloop.data.rows import conversation, filled_text
from prefloop.errors import DataError
from prefloop.records import Message


@dataclass(frozen=True)
class Entry:
    """One conversation that a row holds, with its answers."""

    messages: tuple[Message, ...]
    target: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    tie: bool = False
    label: bool | None = None
    """Of an unpaired answer: whether it is a good one. The answer is `target`, or `rejected`."""
    flaw: str = ""
    """Why its answers cannot be used; the prompt still can."""
    suffix: str = ""
    """Tells apart the entries of one row."""

    @property
    def texts(self) -> Iterator[str]:
        """All that it says."""
        yield from (turn.content for turn in self.messages)
        yield from filter(None, (self.target, self.chosen, self.rejected))


RowContent: TypeAlias = Sequence[Entry] | str
"""What a row holds; or why it cannot be used at all."""


@dataclass
class Cells:
    """A row whose reader leaves a trace: which columns it has looked at."""

    where: str
    row: Row
    used: dict[str, None] = field(default_factory=dict)
    texts_only: bool = False
    """Whether the row is of a table of texts (CSV), where turns are written as JSON."""

    def __contains__(self, name: str) -> bool:
        return not empty(self.row.get(name))

    def get(self, name: str) -> Any:
        """The cell, or None where the row has none."""
        value = self.row.get(name)
        if value is not None:
            self.used[name] = None
        return value

    def first(self, *names: str) -> str | None:
        """The first of the columns that has something in it."""
        return next((name for name in names if name in self), None)

    def text(self, name: str) -> str:
        """The cell, which must be a text."""
        return filled_text(self.where, name, self.get(name))

    def fail(self, problem: str) -> DataError:
        """The error of this row."""
        colon = "" if problem.startswith("has ") else ":"
        return DataError(f"{self.where}{colon} {problem}")


def empty(value: object) -> bool:
    """Whether a cell says nothing: null, "", [] and {}, also as text."""
    return value is None or (
        not isinstance(value, bool | int | float) and (not value or value in ("[]", "{}", "null"))
    )


def is_texts(value: object) -> bool:
    """Whether the cell is a filled list of texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def is_objects(value: object, *keys: str) -> bool:
    """Whether the cell is a filled list of objects with these keys."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, Mapping) and all(key in one for key in keys) for one in value)
    )


# Prompts: from whichever columns hold them.

TALKS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "inputs", "input")
BELOW = {
    "instruction": ("input", "context"),
    **dict.fromkeys(("prompt", "question", "query", "problem", "inputs"), ("input",)),
}
"""Columns with material that is put below a prompt's."""
SYSTEM = ("system", "system_prompt")
ANSWERS = (
    "response",
    "completion",
    "output",
    "answer",
    "solution",
    "targets",
    "target",
)
_TRANSCRIPTS = {
    "\n\nHuman:": re.compile(r"\n\n(Human|Assistant):[ \t]?"),
    "### Human:": re.compile(r"### (Human|Assistant):[ \t]?"),
}
"""How transcripts begin, and what stands before each turn."""


def is_transcript(value: object) -> bool:
    """Whether a text is a dialogue as HH-RLHF ("\\n\\nHuman:") or Guanaco ("### Human:") writes it."""
    return isinstance(value, str) and value.startswith(tuple(_TRANSCRIPTS))


class NoTurns(ValueError):
    """A transcript whose speakers do not alternate, or one of whom says nothing: the row is dropped."""


def transcript(text: str) -> list[Message]:
    """The turns of a transcript; an empty last turn of the assistant waits for the answer and is left out."""
    mark = next(mark for start, mark in _TRANSCRIPTS.items() if text.startswith(start))
    parts = mark.split(text)
    turns: list[Message] = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        role = "assistant" if speaker == "Assistant" else "user"
        if turns and role == turns[-1].role:
            raise NoTurns("the speakers of the transcript do not alternate")
        turns.append(Message(role=role, content=said.strip()))
    if turns and turns[-1].role == "assistant" and not turns[-1].content:
        turns.pop()
    if not turns or any(not turn.content for turn in turns):
        raise NoTurns("a turn of the transcript is empty")
    return turns


_WRITTEN_TURNS = re.compile(r"""\s*\[\s*\{\s*(["'])(role|from|content|value)\1\s*:""")


def is_turns(cells: Cells, name: str) -> bool:
    """Whether a cell holds turns, in a table of texts as JSON; what Python prints of turns is refused there."""
    value = cells.row.get(name)
    if not cells.texts_only or not isinstance(value, str) or not _WRITTEN_TURNS.match(value):
        return isinstance(value, list | Mapping)
    if isinstance(_parsed(value), str):
        raise cells.fail(f"{name!r} holds turns as text that is not JSON; write the cell as JSON")
    return True


def talk(cells: Cells, name: str, *, answer_only: bool = False) -> list[Message]:
    """A column of turns; one turn alone, and JSON text of turns, are read as well."""
    value = cells.get(name)
    if isinstance(value, Mapping):
        value = [value]
    elif isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value)
    return conversation(cells.where, name, value, answer_only=answer_only)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def context(cells: Cells, prompts: Sequence[str] = PROMPTS) -> list[Message]:
    """The turns that wait for an answer, as the prompt's columns have them; [] where there are none."""
    turns = _asked(cells, prompts)
    if turns and "history" not in prompts:
        turns = [*_history(cells), *turns]
    name = cells.first(*SYSTEM)
    if name is None:
        return turns
    said = cells.text(name)
    if turns and turns[0].role == "system":
        if same(turns[0].content, said):
            return turns
        raise cells.fail(
            f"{name!r} and the conversation's own system turn differ; leave one of them"
        )
    return [Message(role="system", content=said), *turns]


def _asked(cells: Cells, prompts: Sequence[str]) -> list[Message]:
    name = cells.first(*prompts)
    if name is None:
        return []
    value = cells.get(name)
    if is_turns(cells, name):
        return talk(cells, name)
    text = filled_text(cells.where, name, value)
    if is_transcript(text):
        return transcript(text)
    below = cells.first(*BELOW.get(name, ()))
    if below is not None and cells.text(below) not in text:
        text = f"{text}\n\n{cells.text(below)}"
    return [Message(role="user", content=text)]


def _history(cells: Cells) -> list[Message]:
    """Earlier turns: pairs of question and answer, as LLaMA-Factory has them, or turns."""
    if "history" not in cells:
        return []
    value = cells.get("history")
    if is_objects(value):
        return talk(cells, "history")
    if isinstance(value, list) and all(is_texts(pair) and len(pair) == 2 for pair in value):
        roles = ("user", "assistant")
        said = [
            {"role": r, "content": t} for pair in value for r, t in zip(roles, pair, strict=True)
        ]
        return conversation(cells.where, "history", said)
    raise cells.fail("'history' must be a list of [question, answer] or of turns; convert it")


def same(one: str, other: str) -> bool:
    """Whether two texts differ in white space at most."""
    return one.split() == other.split()


def joined(cells: Cells, system: list[Message], turns: list[Message]) -> list[Message]:
    """Turns after a system column's turn, which their own one may only repeat."""
    if system and turns[0].role == "system":
        if not same(system[0].content, turns[0].content):
            raise cells.fail(
                "the system column and the conversation's own system turn differ; leave one"
            )
        return turns
    return [*system, *turns]
