"""Which numbers have been met, in little memory: ids of rows are compared by their hashes, and there may be millions."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from heapq import merge

_FEW = 2**16


class Seen:
    """A set of 64-bit numbers that only grows: eight bytes each, but for the latest eighth of them."""

    def __init__(self) -> None:
        self._sorted = array("q")
        self._latest = set[int]()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._latest)

    def add(self, number: int) -> bool:
        """Keep a number, in -2**63 .. 2**63 - 1; whether it is met for the first time."""
        place = bisect_left(self._sorted, number)
        if number in self._latest or (place < len(self._sorted) and self._sorted[place] == number):
            return False
        self._latest.add(number)
        if len(self._latest) > max(_FEW, len(self._sorted) // 8):
            self._sorted = array("q", merge(self._sorted, sorted(self._latest)))
            self._latest.clear()
        return True
