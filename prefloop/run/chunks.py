"""Chunks of a stage that several processes share, each in a file of its own until the run takes them over in order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from prefloop.records import Candidates, Pair, Record, Reject
from prefloop.run_folder import write_atomically

_ALL = "all"
_KINDS: dict[str, type[Record]] = {kind.__name__: kind for kind in (Candidates, Pair, Reject)}


class Parts:
    """The finished chunks of one stage that are not in its file yet."""

    def __init__(self, folder: Path, stage: str) -> None:
        self._folder = folder / f".{stage}.parts"

    @property
    def complete(self) -> bool:
        """Whether the processes have made all that they were to make."""
        return (self._folder / _ALL).exists()

    def finish(self) -> None:
        """Note that they have; without parts there is nothing to note."""
        if self._folder.exists():
            (self._folder / _ALL).touch()

    def has(self, chunk: int) -> bool:
        """Whether the chunk is there, whole."""
        return self._path(chunk).exists()

    def write(self, chunk: int, records: Iterable[Record], counts: Mapping[str, int]) -> None:
        """Leave a chunk, and what it cost, for the run to take."""
        self._folder.mkdir(exist_ok=True)
        lines = [f"{type(record).__name__} {record.model_dump_json()}\n" for record in records]
        write_atomically(self._path(chunk), "".join([f"{json.dumps(counts)}\n", *lines]))

    def read(self, chunk: int) -> tuple[list[Record], dict[str, int]]:
        """The records of a chunk, and what it cost."""
        # Not splitlines: texts may hold other line separators, which JSON leaves as they are.
        counts, *lines, _ = self._path(chunk).read_text(encoding="utf-8").split("\n")
        found = []
        for line in lines:
            kind, _, record = line.partition(" ")
            found.append(_KINDS[kind].model_validate_json(record))
        return found, json.loads(counts)

    def drop(self) -> None:
        """Remove what is left, once all is in the stage's file."""
        if self._folder.exists():
            for part in self._folder.iterdir():
                part.unlink()
            self._folder.rmdir()

    def _path(self, chunk: int) -> Path:
        return self._folder / f"{chunk:06d}"
