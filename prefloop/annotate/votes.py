"""Votes on disk: an append-only log, one line per event, synced before a vote is acknowledged.

Undo and changed votes are lines too; the current votes result from replaying all lines. So the file survives a
kill at any moment: a torn last line was never acknowledged, and the annotator votes again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from prefloop.annotate.items import AnnotationPlan, Comparison, Side
from prefloop.errors import DataError, RunFolderError
from prefloop.manifest import hash_file, read_sealed, sealed, write_atomically
from prefloop.records import Record

Choice: TypeAlias = Literal["a", "b", "tie", "skip"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Header(Record):
    """The first line: the sides, the items and the options that the votes belong to."""

    kind: Literal["round"] = "round"
    a: str
    b: str
    items: int
    identical: int
    digest: str
    """Hash of prompts and answers; votes can be added only for the same ones."""
    plan: AnnotationPlan
    time: str = Field(default_factory=_now)


class Joined(Record):
    """An annotator joined for the first time."""

    kind: Literal["annotator"] = "annotator"
    annotator: str
    time: str = Field(default_factory=_now)


class Vote(Record):
    """One annotator's decision on one item."""

    kind: Literal["vote"] = "vote"
    annotator: str
    item: str
    choice: Choice
    """The better side ("a" or "b", wherever it was shown), or tie, or skip."""
    first: Side
    """The side that was shown as Answer 1."""
    reason: str | None = None
    """The annotator's reason for skipping; None for other choices."""
    seconds: float | None = Field(default=None, ge=0)
    """Seconds since the item was shown, as the page measured them."""
    time: str = Field(default_factory=_now)


class Undo(Record):
    """The annotator withdrew the vote on this item."""

    kind: Literal["undo"] = "undo"
    annotator: str
    item: str
    time: str = Field(default_factory=_now)


Line: TypeAlias = Header | Joined | Vote | Undo
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def annotator_key(annotator: str) -> str:
    """A normalised name, equal for "Anna" and " anna "."""
    return " ".join(annotator.split()).casefold()


class Ballots:
    """The current votes after all lines so far."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        """Annotators' names by `annotator_key`, in the order of joining."""
        self._votes: dict[str, dict[str, Vote]] = {}

    def votes(self, annotator: str) -> Mapping[str, Vote]:
        """One annotator's current votes by item, oldest first."""
        return self._votes.get(annotator, {})

    def apply(self, line: Line) -> None:
        """Update the votes by one line."""
        if isinstance(line, Header):
            return
        annotator = annotator_key(line.annotator)
        votes = self._votes.setdefault(annotator, {})
        self.names.setdefault(annotator, line.annotator)
        if not isinstance(line, Joined):
            votes.pop(line.item, None)  # so that a changed vote becomes the newest one
        if isinstance(line, Vote):
            votes[line.item] = line


class StoredVotes:
    """The contents of a file of votes."""

    def __init__(self, path: Path) -> None:
        """Read all lines. DataError where a line before the last is damaged, RunFolderError where votes are lost."""
        data = path.read_bytes()
        self.header: Header | None = None
        self.ballots = Ballots()
        self.whole_bytes = len(data)
        """Bytes of complete lines; the last one may lack its line break."""
        self.torn_bytes = 0
        """Bytes of an incomplete last line, cut off by a kill or a full disk."""
        lines = data.splitlines(keepends=True)
        for number, text in enumerate(lines, start=1):
            try:
                line = _LINE.validate_json(text)
            except ValidationError as error:
                if number == len(lines) and not text.endswith(b"\n"):
                    self.torn_bytes = len(text)
                    self.whole_bytes -= self.torn_bytes
                    break
                raise DataError(
                    f"{path}:{number} is no vote ({error.errors()[0]['msg']}); correct that line or take it out"
                ) from error
            if isinstance(line, Header) != (number == 1):
                raise DataError(f"{path}:{number} is not where it belongs; begin another --votes")
            if isinstance(line, Header):
                self.header = line
            self.ballots.apply(line)
        _verify(path)


def read_votes(path: Path, comparison: Comparison) -> StoredVotes:
    """Read the votes so far, without changing the file. Raises DataError where there are none."""
    stored = StoredVotes(path) if path.is_file() else None
    if stored is None or stored.header is None:
        raise DataError(
            f"there are no votes in {path}; begin with the same command without --report"
        )
    _check_same_answers(path, stored.header, comparison)
    return stored


class VoteFile:
    """A file of votes, locked and open for appending."""

    def __init__(self, path: Path, comparison: Comparison, plan: AnnotationPlan) -> None:
        """Create or reopen the file. Raises RunFolderError where it is in use, DataError where it is another annotation's."""
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
            stored = StoredVotes(path)
            self.ballots, self.torn_bytes = stored.ballots, stored.torn_bytes
            self._repair_last_line(stored)
            if stored.header is None:
                self.append(_header(comparison, plan))
            else:
                _check_same_answers(path, stored.header, comparison)
                _check_same_plan(path, stored.header.plan, plan)
        except BaseException:
            self._file.close()
            raise

    def append(self, line: Line) -> None:
        """Write one line and sync it to the disk. Raises OSError, with nothing of the line left behind."""
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
        """Close the file and release its lock."""
        self._file.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _repair_last_line(self, stored: StoredVotes) -> None:
        """Cut off an incomplete last line; add the line break that a complete one lacks."""
        os.truncate(self.path, stored.whole_bytes)
        if stored.whole_bytes and not self.path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")
        if stored.whole_bytes:
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


def _header(comparison: Comparison, plan: AnnotationPlan) -> Header:
    return Header(
        a=comparison.names["a"],
        b=comparison.names["b"],
        items=len(comparison.items),
        identical=comparison.identical,
        digest=comparison.digest,
        plan=plan,
    )


def _check_same_answers(path: Path, old: Header, new: Comparison) -> None:
    if old.digest != new.digest:
        raise DataError(
            f"{path} holds votes on other prompts or answers ({old.a} against {old.b}, {old.items} items); "
            "name another --votes"
        )


def _check_same_plan(path: Path, old: AnnotationPlan, new: AnnotationPlan) -> None:
    if old != new:
        given = {name: value for name, value in old.model_dump().items() if value is not None}
        options = " ".join(f"--{name} {value}" for name, value in given.items())
        raise DataError(f"{path} was begun with {options}; give the same, or name another --votes")
