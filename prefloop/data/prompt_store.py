"""Prompts that lie on disk while a run goes on: any of them can be read, none is held."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

from prefloop.records import Prompt


class PromptStore(Sequence[Prompt]):
    """Prompts in a file that has no name and goes with the process; 16 bytes a prompt are held."""

    def __init__(self, prompts: Iterable[Prompt], folder: Path | None = None) -> None:
        """Write `prompts` down in `folder` (null: where the system keeps temporary files)."""
        self._starts, self._lengths = array("Q"), array("Q")
        start = 0
        with tempfile.TemporaryFile(dir=folder) as file:
            for prompt in prompts:
                line = prompt.model_dump_json().encode() + b"\n"
                file.write(line)
                self._starts.append(start)
                self._lengths.append(len(line))
                start += len(line)
            file.flush()
            self._file = _Descriptor(file.fileno())

    def picked(self, indices: Iterable[int]) -> PromptStore:
        """Some of these prompts, in the order of `indices`, over the same file."""
        view = object.__new__(PromptStore)
        view._file = self._file
        view._starts, view._lengths = array("Q"), array("Q")
        for index in indices:
            view._starts.append(self._starts[index])
            view._lengths.append(self._lengths[index])
        return view

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptStore: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptStore:
        if isinstance(index, slice):
            return self.picked(range(*index.indices(len(self))))
        line = self._file.read(self._lengths[index], self._starts[index])
        return Prompt.model_validate_json(line)

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))


class _Descriptor:
    """An open file that several spools share, closed with the last of them."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)

    def read(self, length: int, start: int) -> bytes:
        # pread leaves the file's position alone, which a forked process would share.
        return os.pread(self._descriptor, length, start)

    def __del__(self) -> None:
        os.close(self._descriptor)
