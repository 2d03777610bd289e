"""Pairs of answers with what people, or a stronger model, said about them: read, checked, split by prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from pydantic import Field

from prefloop.data.entries import Placed, Tally, read_entries
from prefloop.data.files import data_file
from prefloop.data.formats import FieldOptions
from prefloop.data.rows import Row, filled_text
from prefloop.errors import DataError
from prefloop.records import Message, Prompt, Record


class Preference(Record):
    """Two answers to one conversation, and which one is better."""

    id: str
    source: str
    """The data set: the file's stem, or what the row's own field `source` says."""
    messages: tuple[Message, ...] = Field(min_length=1)
    chosen: str
    """The better answer; of a tie, the first one in the row."""
    rejected: str
    tie: bool = False
    """Whether most labels say that neither is better."""
    margin: float = 0.0
    """By how much the scores should differ, where the data say so."""
    target: str | None = None
    """A reference answer, for judges that compare with one."""

    @property
    def prompt(self) -> Prompt:
        """The conversation as judges take it."""
        return Prompt(id=self.id, messages=self.messages, target=self.target)

    @property
    def key(self) -> str:
        """Equal for equal conversations: what a split must not divide."""
        turns = "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in self.messages)
        return sha256(turns.encode("utf-8", "surrogatepass")).hexdigest()


class LabelledPairs(Record):
    """What a file held, and what of it cannot be used."""

    pairs: tuple[Preference, ...]
    dropped: dict[str, int]
    """Reason -> rows."""
    notes: tuple[str, ...] = ()
    """How the file was read, what of it was ignored and what dropped."""


def read_preferences(
    source: str,
    *,
    margin_field: str | None = None,
    fields: FieldOptions | None = None,
    split: str = "train",
) -> LabelledPairs:
    """All labelled pairs of a file, folder or Hub data set. Raises DataError with the bad row's place.

    Rows are read by docs/data.md's table of formats; `fields` names columns that it does not know. Pairs that
    say nothing (no majority, an empty answer, twice the same answer) are dropped and counted.
    """
    fields = FieldOptions() if fields is None else fields
    tally = Tally()
    beside = ("source", "tie", *([margin_field] if margin_field else []))
    entries = read_entries(
        source,
        fields,
        part="train",
        subset=None,
        split=split,
        pairs=True,
        tally=tally,
        beside=beside,
    )
    name = _source_name(source)
    pairs = []
    for placed in entries:
        if placed.entry.flaw:
            tally.drop(placed.entry.flaw, placed.where)
        else:
            pairs.append(_preference(placed, name, margin_field))
    if not pairs:
        why = f" ({tally.reasons})" if tally.reasons else ""
        raise DataError(
            f"{source} holds no labelled pairs{why}; give rows with prompt, chosen and rejected"
        )
    return LabelledPairs(
        pairs=tuple(pairs), dropped=dict(tally.dropped), notes=tuple(tally.lines())
    )


def _source_name(source: str) -> str:
    path = Path(source)
    file = data_file(path)
    return file.stem if file else f"{path.name}-train"


def _preference(placed: Placed, source: str, margin_field: str | None) -> Preference:
    entry, row = placed.entry, placed.row
    if entry.chosen is None or entry.rejected is None:
        raise DataError(placed.without_pair)
    target = row.get("target")
    return Preference(
        id=placed.id,
        source=str(row.get("source") or source),
        messages=entry.messages,
        chosen=entry.chosen,
        rejected=entry.rejected,
        tie=entry.tie,
        margin=_margin(placed.where, row, margin_field),
        target=None if target is None else filled_text(placed.where, "target", target),
    )


def split_by_prompt(
    pairs: Sequence[Preference], share: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Training and held-out pairs; all pairs of one conversation are on the same side.

    A side depends on the conversation and the seed alone, so that pairs which are added later, or to
    another file, move no other pair.
    """
    train: list[Preference] = []
    held_out: list[Preference] = []
    for pair in pairs:
        digest = sha256(f"{seed}/{pair.key}".encode()).digest()
        position = int.from_bytes(digest[:8]) / 2**64
        (held_out if position < share else train).append(pair)
    return train, held_out


def _margin(where: str, row: Row, field: str | None) -> float:
    if field is None:
        return 0.0
    value = row.get(field)
    try:
        margin = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise DataError(
            f"{where}: {field!r} is no number; correct it, or leave data.margin_field out"
        )
    return margin


def counts(reasons: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The sum of several counts by reason."""
    total: Counter[str] = Counter()
    for one in reasons:
        total.update(one)
    return dict(total)


def sources(pairs: Sequence[Preference]) -> Iterator[tuple[str, list[Preference]]]:
    """The pairs of each data set, in the order in which the data sets come."""
    for name in dict.fromkeys(pair.source for pair in pairs):
        yield name, [pair for pair in pairs if pair.source == name]
