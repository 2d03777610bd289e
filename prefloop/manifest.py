"""What was written is read back whole, or the reader says so: sealed JSON, hashes of files, manifests of both.

A manifest vouches for itself and for the files of some finished work: sizes are compared when it is read,
contents when a file is used. Against damage and edits by mistake, not against who forges seals.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prefloop.errors import RunFolderError, counted
from prefloop.records import read_json

_SEAL = "seal"
_LARGE = 2**24
"""Bytes from which on a file is hashed once a process only, as long as its size and time stay the same."""


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def hash_file(path: Path, size: int | None = None) -> str:
    """BLAKE2b of a file, or of its first `size` bytes; a large file is read once a process."""
    stat = path.stat()
    end = stat.st_size if size is None else size
    read = _hash_large if stat.st_size >= _LARGE else _hash
    return read(path, end, stat.st_size, stat.st_mtime_ns)


def _hash(path: Path, end: int, size: int, changed: int) -> str:
    found = blake2b(digest_size=16)
    with path.open("rb") as file:
        while end > 0 and (block := file.read(min(end, 2**20))):
            found.update(block)
            end -= len(block)
    return found.hexdigest()


_hash_large = lru_cache(maxsize=1024)(_hash)


def sealed(facts: Mapping[str, Any]) -> str:
    """A JSON object that says when it was changed: `read_sealed` gives `facts` back."""
    return json.dumps({**facts, _SEAL: _seal_of(facts)}, indent=1, ensure_ascii=False) + "\n"


def _seal_of(facts: Mapping[str, Any]) -> str:
    # Read back as it will be: tuples are lists, keys are text.
    text = json.dumps(json.loads(json.dumps(facts)), sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """What `sealed` has written. RunFolderError, with the remedy, where it is damaged or was edited."""
    try:
        facts: Any = read_json(path)
    except RunFolderError as error:
        raise RunFolderError(
            f"{path} is damaged ({error.__cause__ or 'no object'}); {remedy}"
        ) from error
    seal = facts.pop(_SEAL, None)
    if seal != _seal_of(facts):
        raise RunFolderError(f"{path} is not as it was written; {remedy}")
    return dict(facts)


class Manifest:
    """A JSON file of facts about finished work, with size and hash of each file that the work left."""

    def __init__(self, path: Path, remedy: str) -> None:
        """Files are named relative to `path`'s folder. `remedy` tells how the work is done again."""
        self.path = path
        self.remedy = remedy

    def write(
        self, facts: Mapping[str, Any], files: Iterable[Path], *, growing: Iterable[Path] = ()
    ) -> None:
        """Seal the facts and the files; of `growing` ones what is there now, for more may follow."""
        seals = {self._name(path): [path.stat().st_size, hash_file(path)] for path in files}
        tails = {self._name(path): [path.stat().st_size, hash_file(path)] for path in growing}
        both = {"files": seals} | ({"growing": tails} if tails else {})
        write_atomically(self.path, sealed({**facts, **both}))

    def read(self) -> dict[str, Any] | None:
        """The facts; None where there are none. RunFolderError where they, or a file's size, have changed."""
        if not self.path.exists():
            return None
        facts = read_sealed(self.path, self.remedy)
        for name, (size, _) in facts.get("files", {}).items():
            if (have := self._size(name)) != size:
                self._refuse(
                    name, f"is {counted(have, 'byte')} long and not {size} as it was written"
                )
        for name, (size, _) in facts.get("growing", {}).items():
            if (have := self._size(name)) < size:
                self._refuse(
                    name, f"is {counted(have, 'byte')} long and not {size} as it was written"
                )
        return facts

    def verify(self, only: Iterable[Path] | None = None) -> dict[str, Any] | None:
        """`read`, and compare contents: of all files, or of some."""
        facts = self.read()
        if facts is None:
            return None
        chosen = None if only is None else {self._name(path) for path in only}
        for name, (size, wanted) in {**facts.get("growing", {}), **facts.get("files", {})}.items():
            path = self.path.parent / name
            if (chosen is None or name in chosen) and hash_file(path, size) != wanted:
                self._refuse(name, "is not as it was written: some of its bytes have changed")
        return facts

    def release(self, files: Iterable[Path]) -> None:
        """Vouch for these files no longer, so that they may be deleted; size and hash of each stay under "freed"."""
        facts = self.read()
        if facts is None:
            return
        kept, names = facts.get("files", {}), [self._name(path) for path in files]
        freed = {name: kept.pop(name) for name in names if name in kept}
        if freed:
            everything = {**facts.get("freed", {}), **freed}
            write_atomically(self.path, sealed({**facts, "files": kept, "freed": everything}))

    def _name(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.path.parent)).as_posix()

    def _size(self, name: str) -> int:
        path = self.path.parent / name
        if not path.is_file():
            self._refuse(name, "is gone")
        return path.stat().st_size

    def _refuse(self, name: str, what: str) -> None:
        path = Path(os.path.normpath(self.path.parent / name))
        raise RunFolderError(f"{path} {what}; {self.remedy}")
