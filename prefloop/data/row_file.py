"""Rows of bytes in a file without a name: any of them can be read, none is held in memory."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path


class RowFile:
    """A file that goes with the process; 16 bytes a row are held."""

    def __init__(self, rows: Iterable[bytes], folder: Path | None = None) -> None:
        """Write `rows` down in `folder` (null: where the system keeps temporary files)."""
        self._starts, self._lengths = array("Q"), array("Q")
        start = 0
        with tempfile.TemporaryFile(dir=folder) as file:
            for row in rows:
                file.write(row)
                self._starts.append(start)
                self._lengths.append(len(row))
                start += len(row)
            file.flush()
            self._file = _Descriptor(file.fileno())

    def picked(self, indices: Iterable[int]) -> RowFile:
        """Some of these rows, in the order of `indices`, over the same file."""
        view = object.__new__(RowFile)
        view._file = self._file
        view._starts, view._lengths = array("Q"), array("Q")
        for index in indices:
            view._starts.append(self._starts[index])
            view._lengths.append(self._lengths[index])
        return view

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        return self._file.read(self._lengths[index], self._starts[index])


class _Descriptor:
    """An open file that several views share, closed with the last of them."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)

    def read(self, length: int, start: int) -> bytes:
        # pread leaves the file's position alone, which a forked process would share.
        return os.pread(self._descriptor, length, start)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Kept as a default: at a process's end modules are emptied before objects go.
        close(self._descriptor)
