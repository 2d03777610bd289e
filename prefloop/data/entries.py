"""The entries of a source, with a count of what was read how, what was ignored and what was dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from prefloop.data.cells import Entry
from prefloop.data.files import Row
from prefloop.data.formats import FieldOptions, read_row
from prefloop.data.rows import EMBEDDED, open_rows
from prefloop.errors import DataError, counted
from prefloop.records import Message


@dataclass
class Tally:
    """What reading one source came to."""

    source: str = ""
    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    used: dict[str, None] = field(default_factory=dict)
    ignored: dict[str, None] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows, or pairs of a row."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> where it was met first."""

    def drop(self, reason: str, where: str) -> None:
        """Count what is left out."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    @property
    def reasons(self) -> str:
        """Why entries were dropped, how many and where first."""
        return "; ".join(
            f"{count:,} dropped: {reason}, first {self.first[reason]}"
            for reason, count in self.dropped.most_common()
        )

    def lines(self) -> Iterator[str]:
        """What a user should know, a sentence each."""
        formats = ", ".join(
            name if len(self.formats) == 1 else f"{name} ({count:,})"
            for name, count in self.formats.most_common()
        )
        ignored = ", ".join(name for name in self.ignored if name not in self.used)
        yield (
            f"{self.source}: {counted(self.rows, 'row')} read as {formats} from {', '.join(self.used)}"
            + (f"; ignored: {ignored}" if ignored else "")
        )
        for reason, count in self.dropped.most_common():
            yield f"{self.source}: {count:,} dropped: {reason} (first: {self.first[reason]})"


class Placed(NamedTuple):
    """An entry with its place, its id and the row that it comes from."""

    where: str
    id: str
    entry: Entry
    row: Row

    @property
    def without_pair(self) -> str:
        """What to say of it where a labelled pair is needed."""
        columns = ", ".join(repr(str(name)[:40]) for name in self.row) or "none"
        return (
            f"{self.where} has neither 'chosen' and 'rejected' nor 'response_1' and 'response_2' (its "
            f"columns: {columns}); name the columns with the two answers in data.chosen_field and "
            "data.rejected_field, or rename them"
        )


def read_entries(
    source: str,
    options: FieldOptions,
    *,
    part: str,
    subset: str | None,
    split: str,
    pairs: bool,
    tally: Tally,
    beside: Sequence[str] = (),
) -> Iterator[Placed]:
    """Stream the entries of a source; `beside` names columns that the caller reads from the row itself.

    With `pairs` unpaired answers (KTO) of one prompt are put together after the last row: its n-th good
    answer with its n-th bad one. Raises DataError with the place of a malformed row, or where there is none.
    """
    stem, rows = open_rows(source, part, subset, split, pairs=pairs)
    if source == EMBEDDED:
        options = FieldOptions()
    tally.source = source
    entries = _entries(rows, stem, options, tally, beside)
    yield from put_together(entries, tally) if pairs else entries
    if not tally.rows:
        raise DataError(f"{source} holds no rows; name a source with prompts in data.{part}")


def _entries(
    rows: Iterable[tuple[str, Row]],
    stem: str,
    options: FieldOptions,
    tally: Tally,
    beside: Sequence[str],
) -> Iterator[Placed]:
    known = (*beside, options.id_field or "")
    for number, (where, row) in enumerate(rows, start=1):
        tally.rows = number
        read = read_row(where, row, options, known)
        tally.formats[read.format.name] += 1
        tally.used |= dict.fromkeys(read.used)
        tally.ignored |= dict.fromkeys(read.ignored)
        if isinstance(read.content, str):
            tally.drop(read.content, where)
            continue
        identity = _identity(where, row, options, f"{stem}-{number}")
        for entry in read.content:
            yield Placed(where, identity + entry.suffix, entry, row)


def _identity(where: str, row: Row, options: FieldOptions, default: str) -> str:
    given = row.get(options.id_field) if options.id_field else None
    identity = default if given is None else given
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise DataError(f"{where}: {options.id_field!r} must be a text or a whole number")
    return str(identity)


def put_together(entries: Iterator[Placed], tally: Tally) -> Iterator[Placed]:
    """Pairs as they are; unpaired answers by prompt, a good one with a bad one, after the last entry."""
    waiting: dict[tuple[Message, ...], tuple[list[Placed], list[Placed]]] = {}
    for one in entries:
        if one.entry.label is None:
            yield one
        else:
            good, bad = waiting.setdefault(one.entry.messages, ([], []))
            (good if one.entry.label else bad).append(one)
    for good, bad in waiting.values():
        for better, worse in zip(good, bad, strict=False):
            chosen, rejected = better.entry.target, worse.entry.rejected
            flaw = "identical answers" if chosen == rejected else ""
            entry = replace(better.entry, chosen=chosen, rejected=rejected, label=None, flaw=flaw)
            yield better._replace(entry=entry)
        for left in (*good[len(bad) :], *bad[len(good) :]):
            tally.drop("no answer with the other label to its prompt", left.where)
