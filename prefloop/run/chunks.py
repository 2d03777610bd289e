"""A stage chunk by chunk: written in whole chunks, by one process or several, and continued where it was killed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from prefloop.errors import RunFolderError
from prefloop.manifest import sealed, write_atomically
from prefloop.records import Candidates, Pair, Record, Reject
from prefloop.run_folder import REJECTS, RoundDir

_ALL = "all"

MakeChunk = Callable[[int, list[Any]], tuple[list[Record], dict[str, int]]]
_KINDS: dict[str, type[Record]] = {kind.__name__: kind for kind in (Candidates, Pair, Reject)}


class ChunkStore:
    """Chunks of one stage that workers have written and the run has not yet taken into the stage's file."""

    def __init__(self, folder: Path, stage: str) -> None:
        self._folder = folder / f".{stage}.parts"

    @property
    def complete(self) -> bool:
        """Whether the workers have written all their chunks."""
        return (self._folder / _ALL).exists()

    def finish(self) -> None:
        """Note that they have; nothing is noted where there are no chunks."""
        if self._folder.exists():
            (self._folder / _ALL).touch()

    def has(self, chunk: int) -> bool:
        """Whether the chunk is there, whole."""
        return self._path(chunk).exists()

    def write(self, chunk: int, records: Iterable[Record], counts: Mapping[str, int]) -> None:
        """Write a chunk and its token counts, for the run to merge."""
        self._folder.mkdir(exist_ok=True)
        lines = [f"{type(record).__name__} {record.model_dump_json()}\n" for record in records]
        text = "".join([f"{json.dumps(counts)}\n", *lines])
        write_atomically(self._path(chunk), f"{_hash(text)}\n{text}")

    def read(self, chunk: int) -> tuple[list[Record], dict[str, int]]:
        """The records of a chunk, and what it cost. RunFolderError where the chunk is not as it was written."""
        path = self._path(chunk)
        seal, _, text = path.read_text(encoding="utf-8", errors="replace").partition("\n")
        if seal != _hash(text):
            raise RunFolderError(
                f"{path} is not as it was written; delete {path.parent}, and the same command makes its "
                "chunks again"
            )
        # Not splitlines: texts may hold other line separators, which JSON leaves as they are.
        counts, *lines, _ = text.split("\n")
        records = []
        for line in lines:
            kind, _, record = line.partition(" ")
            records.append(_KINDS[kind].model_validate_json(record))
        return records, json.loads(counts)

    def drop(self) -> None:
        """Remove what is left, once all is in the stage's file."""
        if self._folder.exists():
            for part in self._folder.iterdir():
                part.unlink()
            self._folder.rmdir()

    def _path(self, chunk: int) -> Path:
        return self._folder / f"{chunk:06d}"


class Journal:
    """Append-only record files of one stage, advanced in whole chunks."""

    def __init__(self, folder: Path, stage: str) -> None:
        """Open the stage's files, cut back to the last whole chunk if the stage was killed.

        Raises RunFolderError where what was written before is not there any more, or has changed.
        """
        round_dir = RoundDir(folder, 0)
        self._note = folder / f"{stage}.progress.json"
        self._main = folder / f"{stage}.jsonl"
        self._files = (self._main, folder / REJECTS)
        if self._note.exists():
            note = round_dir.verify_begun(stage)
        else:
            # The stage's own file starts empty; rejects of earlier stages stay.
            before = round_dir.rejects_before(stage)
            note = {"chunks": 0, self._main.name: [0, _hash("")], REJECTS: [before, None]}
        self.chunks: int = note["chunks"]
        self.counts: Counter[str] = Counter(note.get("counts", {}))
        for path in self._files:
            path.touch()
            os.truncate(path, note[path.name][0])
        self._hashes = [_running(path) for path in self._files]
        self._write_note()

    def append(self, records: Iterable[Record], counts: Mapping[str, int] | None = None) -> None:
        """Write one chunk: rejects to the rejects, all else to the stage's file; then note it.

        `counts` of what the chunk cost are added to `self.counts`, which survives a kill.
        """
        lines: tuple[list[str], list[str]] = ([], [])
        for record in records:
            lines[isinstance(record, Reject)].append(record.model_dump_json() + "\n")
        for path, new, running in zip(self._files, lines, self._hashes, strict=True):
            data = "".join(new).encode()
            with path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            running.update(data)
        self.chunks += 1
        self.counts.update(counts or {})
        self._write_note()

    def _write_note(self) -> None:
        facts: dict[str, Any] = {"chunks": self.chunks, "counts": self.counts}
        for path, running in zip(self._files, self._hashes, strict=True):
            facts[path.name] = [path.stat().st_size, running.hexdigest()]
        write_atomically(self._note, sealed(facts))


def _hash(text: str) -> str:
    return blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _running(path: Path) -> blake2b:
    """A hash of the file so far, to be updated with what is appended."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest


class Chunks:
    """The items of a stage in chunks, and how a chunk becomes records."""

    def __init__(self, items: Iterable[Any], size: int, make: MakeChunk, store: ChunkStore) -> None:
        """`make` gives a chunk's records and what they cost, by the chunk's number."""
        self._items = iter(items)
        self._size = size
        self._make = make
        self._store = store

    def make_for_run(self, rank: int, ranks: int) -> None:
        """As one of several processes: make every `ranks`-th chunk, from chunk `rank` on."""
        for number, chunk in islice(self._numbered(), rank, None, ranks):
            if not self._store.has(number):
                self._store.write(number, *self._make(number, chunk))

    def write(self, journal: Journal) -> None:
        """Append to the stage's files what is not there yet; what processes have made is taken over."""
        for number, chunk in islice(self._numbered(), journal.chunks, None):
            made = self._store.has(number)
            journal.append(*(self._store.read(number) if made else self._make(number, chunk)))

    def _numbered(self) -> Iterator[tuple[int, list[Any]]]:
        return enumerate(iter(lambda: list(islice(self._items, self._size)), []))
