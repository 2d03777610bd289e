"""How far two texts are apart, and where: pure functions on strings and word lists."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

Kind = Literal["same", "old", "new"]


class Span(NamedTuple):
    """A stretch of text that both versions share, or that only the old or the new one has."""

    kind: Kind
    text: str


def fold_whitespace(text: str) -> str:
    """The text with each run of whitespace as one space, none at the ends.

    Two answers are "identical" when they are equal after this (IAL App. B.4).
    """
    return " ".join(text.split())


def levenshtein(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions of items that turn `a` into `b`.

    One column of the distance table is kept as two bit vectors of the steps between its rows (+1 in
    `up`, -1 in `down`): Myers (1999), J. ACM 46(3), in Hyyrö's (2003) form. Exact, and linear in
    len(b) while Python's integers do the rest, so answers of a thousand tokens take milliseconds.
    """
    if not a:
        return len(b)
    rows: dict[Hashable, int] = {}
    for row, item in enumerate(a):
        rows[item] = rows.get(item, 0) | 1 << row
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = every, 0, len(a)
    for item in b:
        match = rows.get(item, 0)
        diagonal = ((((match & up) + up) ^ up) | match | down) & every
        right_up = (down | ~(diagonal | up)) & every
        right_down = diagonal & up
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = right_up << 1 | 1
        up = (right_down << 1 | ~(diagonal | right_up)) & every
        down = right_up & diagonal & every
    return distance


def normalised_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """`levenshtein` over the longer length: 0 for equal sequences, 1 where nothing is kept in place."""
    longer = max(len(a), len(b))
    return levenshtein(a, b) / longer if longer else 0.0


def edit_share(a: str, b: str) -> float:
    """Normalised edit distance between two texts in words, in [0, 1]; whitespace does not count."""
    return normalised_distance(a.split(), b.split())


def spans(old: str, new: str) -> list[Span]:
    """Where two texts differ, word by word.

    Nothing is lost: the spans that are not "new" join to `old`, those that are not "old" to `new`.
    Where words were replaced, the old ones come first.
    """
    pieces_old, pieces_new = re.findall(r"\s+|\S+", old), re.findall(r"\s+|\S+", new)
    # As junk, spaces never start a match of their own: replaced phrases stay in one piece.
    matcher = SequenceMatcher(str.isspace, pieces_old, pieces_new, autojunk=False)
    spans: list[Span] = []
    for kind, old_from, old_to, new_from, new_to in matcher.get_opcodes():
        before, after = "".join(pieces_old[old_from:old_to]), "".join(pieces_new[new_from:new_to])
        if kind == "equal":
            spans.append(Span("same", before))
            continue
        if before:
            spans.append(Span("old", before))
        if after:
            spans.append(Span("new", after))
    return spans
