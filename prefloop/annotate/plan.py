"""Who sees which items, in which order, and whose answer stands first: all drawn from one seed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from pydantic import Field

from prefloop.annotate.items import Side
from prefloop.errors import DataError
from prefloop.records import Record
from prefloop.seeds import derive_seed


class Plan(Record):
    """The options of a round of annotation, kept in the file of votes."""

    seed: int = 0
    """Draws the order of the items and the sides, for each annotator by name."""
    each: int | None = Field(default=None, ge=1)
    """Items that each annotator sees; None: all."""
    shared: int | None = Field(default=None, ge=0)
    """Of them, how many are the same for everybody, so that agreement can be told; None: a fifth of `each`."""

    def order(self, items: Sequence[str], annotator: str, number: int) -> list[str]:
        """The items of one annotator, in the order in which they are shown.

        `number` counts annotators from 0 as they came. All share the same first items of a seeded
        permutation; from the others each takes the stretch after the one before, round and round, so that
        every item has as many votes as any other, or one more.
        """
        drawn = list(items)
        Random(derive_seed(self.seed, "items")).shuffle(drawn)
        if self.each is not None and self.each < len(drawn):
            shared = self.each // 5 if self.shared is None else self.shared
            rest, own = drawn[shared:], self.each - shared
            stretch = [rest[(number * own + place) % len(rest)] for place in range(own)]
            drawn = [*drawn[:shared], *stretch]
        Random(derive_seed(self.seed, "order", annotator)).shuffle(drawn)
        return drawn

    def first(self, annotator: str, item: str) -> Side:
        """Whose answer is "Answer 1": on the left, or above where the page is narrow."""
        return "b" if derive_seed(self.seed, "side", annotator, item) % 2 else "a"


def make_plan(seed: int, each: int | None, shared: int | None) -> Plan:
    """A plan from the options of the command line. Raises DataError where they contradict each other."""
    if shared is not None and (each is None or shared > each):
        raise DataError(
            f"--shared {shared} needs --each with at least that number; without --each everybody sees "
            "all items"
        )
    return Plan(seed=seed, each=each, shared=shared)
