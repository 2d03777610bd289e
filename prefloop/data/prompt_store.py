"""Prompts that lie on disk while a run goes on: any of them can be read, none is held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

from prefloop.data.row_file import RowFile
from prefloop.records import Prompt


class PromptStore(Sequence[Prompt]):
    """Prompts in a file that has no name and goes with the process."""

    def __init__(self, prompts: Iterable[Prompt], folder: Path | None = None) -> None:
        """Write `prompts` down in `folder` (null: where the system keeps temporary files)."""
        self._rows = RowFile((prompt.model_dump_json().encode() for prompt in prompts), folder)

    def picked(self, indices: Iterable[int]) -> PromptStore:
        """Some of these prompts, in the order of `indices`, over the same file."""
        view = object.__new__(PromptStore)
        view._rows = self._rows.picked(indices)
        return view

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptStore: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptStore:
        if isinstance(index, slice):
            return self.picked(range(*index.indices(len(self))))
        return Prompt.model_validate_json(self._rows[index])

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))
