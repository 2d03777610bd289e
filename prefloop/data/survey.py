"""What a source holds, before anything is trained on it: uses, lengths, duplicates, and conversations to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from prefloop.data.cells import Entry
from prefloop.data.entries import Placed, Tally, put_together, read_entries
from prefloop.data.prompts import SourceOptions

PERCENTILES = (50, 90, 99)


@dataclass
class Use:
    """What one kind of method gets of the source."""

    usable: int = 0
    without: Counter[str] = field(default_factory=Counter)
    """Why an entry gives nothing, how often."""

    def add(self, entry: Entry, has_it: bool, missing: str) -> None:
        """Count one entry."""
        if has_it and not entry.flaw and not entry.tie:
            self.usable += 1
        elif has_it or entry.flaw or entry.tie:
            self.without[entry.flaw or "tie"] += 1
        else:
            self.without[missing] += 1


@dataclass(frozen=True)
class Lengths:
    """Tokens of one kind of text, and how many exceed their limit."""

    percentiles: dict[str, int]
    longest: int
    limit: int
    over: int


@dataclass(frozen=True)
class Survey:
    """All of it."""

    notes: tuple[str, ...]
    uses: dict[str, Use]
    """Of prompts, targets and pairs."""
    lengths: dict[str, Lengths]
    """Of prompts and answers, where tokens could be counted."""
    equal_prompts: int
    """Conversations that came before."""
    equal_rows: int
    """Conversations that came before with the same answers."""
    first: tuple[Placed, ...]


def survey(
    options: SourceOptions,
    *,
    split: str,
    limits: tuple[int, int],
    count_tokens: Callable[[str], int],
    show: int,
) -> Survey:
    """Read a whole source, held in memory. `limits`: tokens of a prompt and of an answer. Raises DataError."""
    tally = Tally()
    placed_entries = list(
        read_entries(
            options.source,
            options,
            part="train",
            subset=options.subset,
            split=options.split or split,
            pairs=False,
            tally=tally,
        )
    )
    entries = [placed.entry for placed in placed_entries]
    paired = put_together(iter(placed_entries), Tally())
    return Survey(
        notes=tuple(tally.lines()),
        uses=_uses(entries, [placed.entry for placed in paired]),
        lengths=_lengths(entries, limits, count_tokens),
        equal_prompts=len(entries) - len({entry.messages for entry in entries}),
        equal_rows=len(entries) - len({(e.messages, *_answers(e)) for e in entries}),
        first=tuple(placed_entries[:show]),
    )


def _uses(entries: Iterable[Entry], paired: Iterable[Entry]) -> dict[str, Use]:
    uses = {"prompts": Use(), "targets": Use(), "pairs": Use()}
    for entry in entries:
        uses["prompts"].usable += 1
        if entry.target is not None:
            uses["targets"].usable += 1
        else:
            uses["targets"].add(entry, False, "no answer")
    for entry in paired:
        uses["pairs"].add(entry, entry.chosen is not None, "no second answer")
    return uses


def _answers(entry: Entry) -> tuple[str, ...]:
    return tuple(filter(None, (entry.target, entry.chosen, entry.rejected)))


def _lengths(
    entries: Sequence[Entry], limits: tuple[int, int], count: Callable[[str], int]
) -> dict[str, Lengths]:
    prompts = [sum(count(turn.content) for turn in entry.messages) for entry in entries]
    texts = chain.from_iterable(dict.fromkeys(_answers(entry)) for entry in entries)
    texts_and_limits = {
        "prompt": (prompts, limits[0]),
        "answer": ([count(t) for t in texts], limits[1]),
    }
    return {
        name: _spread(sorted(sizes), limit)
        for name, (sizes, limit) in texts_and_limits.items()
        if sizes
    }


def _spread(sizes: Sequence[int], limit: int) -> Lengths:
    """By nearest rank."""
    return Lengths(
        percentiles={f"p{p}": sizes[-(-len(sizes) * p // 100) - 1] for p in PERCENTILES},
        longest=sizes[-1],
        limit=limit,
        over=sum(size > limit for size in sizes),
    )
