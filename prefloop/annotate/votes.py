"""Votes on disk: one line each, flushed and synced before anybody is told that they count.

Nothing is ever taken back from the file: undoing is a line, and so is voting again. What stands is
what replaying the lines gives, so the file survives a kill at any moment; a torn last line was never
acknowledged and is given again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from prefloop.annotate.items import Comparison, Plan, Side
from prefloop.errors import DataError, RunFolderError
from prefloop.manifest import hash_file, read_sealed, sealed, write_atomically
from prefloop.records import Record

Choice: TypeAlias = Literal["a", "b", "tie", "skip"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Head(Record):
    """The first line: what the votes are about."""

    kind: Literal["round"] = "round"
    a: str
    b: str
    items: int
    identical: int
    digest: str
    """Of prompts and answers; votes go on only with the same ones."""
    plan: Plan
    time: str = Field(default_factory=_now)


class Joined(Record):
    """Somebody gave a name for the first time."""

    kind: Literal["annotator"] = "annotator"
    annotator: str
    time: str = Field(default_factory=_now)


class Vote(Record):
    """One decision."""

    kind: Literal["vote"] = "vote"
    annotator: str
    item: str
    choice: Choice
    """The side that is better, whatever side it was shown on."""
    first: Side
    """The side that was shown as Answer 1."""
    reason: str | None = None
    """Why it was skipped."""
    seconds: float | None = Field(default=None, ge=0)
    """From when the item was shown, as the page measured it."""
    time: str = Field(default_factory=_now)


class Undo(Record):
    """The annotator took the vote on this item back."""

    kind: Literal["undo"] = "undo"
    annotator: str
    item: str
    time: str = Field(default_factory=_now)


Line: TypeAlias = Head | Joined | Vote | Undo
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def key(annotator: str) -> str:
    """Equal for spellings of one name: "Anna" and " anna "."""
    return " ".join(annotator.split()).casefold()


class Ballots:
    """What stands after all lines so far."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        """Annotators by key, as they came."""
        self._votes: dict[str, dict[str, Vote]] = {}

    def votes(self, annotator: str) -> Mapping[str, Vote]:
        """One annotator's standing votes by item, oldest first."""
        return self._votes.get(annotator, {})

    def apply(self, line: Line) -> None:
        """Take one line into account."""
        if isinstance(line, Head):
            return
        who = key(line.annotator)
        votes = self._votes.setdefault(who, {})
        self.names.setdefault(who, line.annotator)
        if not isinstance(line, Joined):
            votes.pop(line.item, None)  # a new vote is the newest one
        if isinstance(line, Vote):
            votes[line.item] = line


class Stored:
    """What a file of votes holds."""

    def __init__(self, path: Path) -> None:
        """Read it whole. DataError where a line before the last is damaged, RunFolderError where votes are lost."""
        data = path.read_bytes()
        self.head: Head | None = None
        self.ballots = Ballots()
        self.whole = len(data)
        """Bytes that are whole lines, or a last line that lacks its line break only."""
        self.torn = 0
        """Bytes of a last line that a kill or a full disk cut off."""
        lines = data.splitlines(keepends=True)
        for number, text in enumerate(lines, start=1):
            try:
                line = _LINE.validate_json(text)
            except ValidationError as error:
                if number == len(lines) and not text.endswith(b"\n"):
                    self.torn = len(text)
                    self.whole -= self.torn
                    break
                raise DataError(
                    f"{path}:{number} is no vote ({error.errors()[0]['msg']}); correct that line or take it out"
                ) from error
            if isinstance(line, Head) != (number == 1):
                raise DataError(f"{path}:{number} is not where it belongs; begin another --votes")
            if isinstance(line, Head):
                self.head = line
            self.ballots.apply(line)
        _verify(path)


def read_votes(path: Path, comparison: Comparison) -> Stored:
    """The votes so far, to look at; changes nothing in the file. Raises DataError where there are none."""
    stored = Stored(path) if path.is_file() else None
    if stored is None or stored.head is None:
        raise DataError(
            f"there are no votes in {path}; begin with the same command without --report"
        )
    _same_answers(path, stored.head, comparison)
    return stored


class VoteFile:
    """A file of votes that this process alone appends to."""

    def __init__(self, path: Path, comparison: Comparison, plan: Plan) -> None:
        """Begin the file or go on with it. Raises RunFolderError or DataError where that cannot be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise RunFolderError(
                f"{path} is in use by another prefloop annotate; use that one, or name another --votes"
            ) from error
        try:
            stored = Stored(path)
            self.ballots, self.torn = stored.ballots, stored.torn
            self._mend(stored)
            if stored.head is None:
                self.append(_head(comparison, plan))
            else:
                _same_answers(path, stored.head, comparison)
                _same_plan(path, stored.head.plan, plan)
        except BaseException:
            self._file.close()
            raise

    def append(self, line: Line) -> None:
        """Write one line and wait until it is on the disk; only then does it count.

        Where the disk refuses, nothing of the line stays behind. Raises OSError.
        """
        size = self._size()
        data = memoryview(line.model_dump_json().encode() + b"\n")
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
            _note(self.path)
        except OSError:
            os.truncate(self.path, size)
            raise
        self.ballots.apply(line)

    def close(self) -> None:
        """Let another process have the file."""
        self._file.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _mend(self, stored: Stored) -> None:
        """Cut a torn line off; give a whole one the line break that it lacks."""
        os.truncate(self.path, stored.whole)
        if stored.whole and not self.path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")
        if stored.whole:
            _note(self.path)


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.done.json")


def _note(path: Path) -> None:
    """Write down what the file holds, so that a vote that is changed or lost later is noticed."""
    write_atomically(_seal(path), sealed({"bytes": path.stat().st_size, "hash": hash_file(path)}))


def _verify(path: Path) -> None:
    """RunFolderError where votes that counted are not there as they were given."""
    if not _seal(path).exists():
        return
    remedy = f"put it back, or delete {_seal(path)} to go on with the votes as they are"
    noted = read_sealed(_seal(path), remedy)
    if path.stat().st_size < noted["bytes"] or hash_file(path, noted["bytes"]) != noted["hash"]:
        raise RunFolderError(f"{path} does not hold the votes as they were given; {remedy}")


def _head(comparison: Comparison, plan: Plan) -> Head:
    return Head(
        a=comparison.names["a"],
        b=comparison.names["b"],
        items=len(comparison.items),
        identical=comparison.identical,
        digest=comparison.digest,
        plan=plan,
    )


def _same_answers(path: Path, old: Head, new: Comparison) -> None:
    if old.digest != new.digest:
        raise DataError(
            f"{path} holds votes on other prompts or answers ({old.a} against {old.b}, {old.items} items); "
            "name another --votes"
        )


def _same_plan(path: Path, old: Plan, new: Plan) -> None:
    if old != new:
        given = {name: value for name, value in old.model_dump().items() if value is not None}
        options = " ".join(f"--{name} {value}" for name, value in given.items())
        raise DataError(f"{path} was begun with {options}; give the same, or name another --votes")
