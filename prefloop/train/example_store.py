"""Training examples that lie on disk while they are trained on: a round's tokens need not fit in memory."""

from __future__ import annotations

import marshal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

from prefloop.data.row_file import RowFile
from prefloop.train.batches import Example
from prefloop.train.packing import TokenGroup


class ExampleStore(Sequence[Example]):
    """Examples in a file that has no name and goes with the process."""

    def __init__(self, examples: Iterable[Example], folder: Path | None = None) -> None:
        """Write `examples` down in `folder` (null: where the system keeps temporary files)."""
        # Plain tuples of numbers, read by the process that wrote them: marshal is exact, and faster than JSON.
        rows = (marshal.dumps((tuple(one.group), *one[2:], one.id)) for one in examples)
        self._rows = RowFile(rows, folder)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        group, *numbers, name = marshal.loads(self._rows[index])
        return Example(name, TokenGroup(*group), *numbers)
