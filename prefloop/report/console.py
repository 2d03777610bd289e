"""Console output of a run: stage lines, the table of rounds, pairs with their differences.

Coloured on a terminal; in a pipe or file plain lines, never cut or wrapped. A model's text is shown
literally: no markup, no control sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefloop.data.text_distance import Span, spans
from prefloop.errors import counted
from prefloop.records import Pair, RoundResult
from prefloop.report.formats import _CONTROLS, coloured, marked, printable

# Order of the table, most important first. A key that starts with one of these ("win_rate_low") follows it.
MEASURES = (
    "score",
    "win_rate",
    "R_i",
    "identical_rate",
    "flaw_edit_share",
    "M",
    "flaw_unseen",
    "train_loss",
    "train_accuracy",
    "train_margin",
    "train_reward_margin",
    "train_real_reward",
    "kl",
    "distinct_2",
    "mean_length",
    "stop_rate",
)

WIN_RATE_ENDS = ("win_rate_low", "win_rate_high")
"""The ends of the win rate's 95 % interval."""

_MAX_COLUMNS = 8

_TINY = 5e-4

_CONTROLS |= {127: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def measure_names(results: Sequence[RoundResult]) -> list[str]:
    """Every measure that any round has: those of MEASURES in that order, then the others by name."""

    def sort_key(name: str) -> tuple[int, bool, str]:
        known = [i for i, key in enumerate(MEASURES) if name == key or name.startswith(f"{key}_")]
        return (min(known) if known else len(MEASURES), name.endswith("_high"), name)

    return sorted({name for result in results for name in result.measures}, key=sort_key)


def round_name(number: int) -> str:
    """The round's number as text; "start" for the initial policy (-1)."""
    return "start" if number < 0 else str(number)


def format_values(values: Sequence[float | None]) -> list[str]:
    """One measure's values as text with equal decimals; "-" for None."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    largest = max(map(abs, finite), default=0.0)
    if 0 < largest < _TINY:
        form = ".1e"
    elif largest > 1 and all(value.is_integer() for value in finite):
        form = ".0f"
    else:
        form = ".1f" if largest >= 100 else ".3f"
    return ["-" if value is None else format(value, form) for value in values]


def visible_rounds(
    results: Sequence[RoundResult], limit: int = _MAX_COLUMNS
) -> list[RoundResult | None]:
    """The rounds that fit a table: all, or the first two, None for those left out, and the latest."""
    if len(results) <= limit:
        return list(results)
    return [*results[:2], None, *results[3 - limit :]]


def round_table(results: Sequence[RoundResult], *, arrows: bool = True) -> Table:
    """One row a measure, one column a round, then the change from the first column to the last.

    `arrows` adds to each value whether it rose or fell since the round before; it does not say whether that is good.
    """
    shown, gap = visible_rounds(results), "…" if arrows else "..."
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("round", no_wrap=True)
    for result in shown:
        table.add_column(
            gap if result is None else round_name(result.round), justify="right", no_wrap=True
        )
    table.add_column("change", justify="right", no_wrap=True)
    for name in measure_names(results):
        history = [result.measures.get(name) for result in results]
        texts = {
            result.round: text for result, text in zip(results, format_values(history), strict=True)
        }
        if arrows:
            for result, (before, after) in zip(results, pairwise([None, *history]), strict=True):
                texts[result.round] += arrow(before, after)
        cells = [gap if result is None else texts[result.round] for result in shown]
        table.add_row(Text(printable(name)), *cells, total_change(history))
    return table


def show_rounds(results: Sequence[RoundResult], console: Console) -> None:
    """Print the table of rounds."""
    if console.is_terminal and not console.options.ascii_only:
        console.print(round_table(results))
        return
    table = round_table(results, arrows=False)
    options = console.options.update(width=10_000, max_width=10_000)
    lines = [
        "".join(piece.text for piece in line).rstrip()
        for line in console.render_lines(table, options)
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)


def show_pair(pair: Pair, console: Console) -> None:
    """Print a pair: the conversation, then both answers with the words that differ marked.

    Red or `[-...-]` is only in the rejected answer, green or `{+...+}` only in the chosen one.
    """
    marked_spans = [Span(kind, printable(text)) for kind, text in spans(pair.rejected, pair.chosen)]
    colour = in_colour(console)
    details = [f"margin {pair.margin:.3g}"] if pair.margin else []
    details += [f"{role}: {name}" for role, name in pair.origin.items()]
    details += [f"{role} scores {score:.3g}" for role, score in pair.scores.items()]
    blocks: list[tuple[str, str | Text]] = [
        (turn.role, printable(turn.content)) for turn in pair.prompt
    ]
    if pair.target is not None:
        blocks.append(("target", printable(pair.target)))
    blocks.append(
        ("chosen", coloured(marked_spans, "old") if colour else marked(marked_spans, "old"))
    )
    blocks.append(
        ("rejected", coloured(marked_spans, "new") if colour else marked(marked_spans, "new"))
    )
    show_text(console, Text(printable("  ".join([f"pair {pair.id}", *details])), style="bold"))
    for name, body in blocks:
        show_text(console, Text(name, style="dim"))
        show_text(console, body)
    show_text(console, "")


def stage_line(
    round: int, stage: str, counts: Mapping[str, int], seconds: float, about: str = ""
) -> str:
    """One finished stage in one line; `counts` by plural noun: "round 0  pairs  31 pairs, 1 reject  4.0 s"."""
    counts_text = ", ".join(
        counted(count, noun.removesuffix("s"), noun) for noun, count in counts.items()
    )
    round_text = "start  " if round < 0 else f"round {round}"
    parts = (round_text, f"{stage:<10}", counts_text, duration(seconds), about)
    return "  ".join(part for part in parts if part)


# Measures of a round's one-line summary, and their names there.
_GLANCE_NAMES = {
    "score": "score",
    "win_rate": "win rate",
    "R_i": "rewrites better than drafts (R_i)",
    "kl": "KL",
    "stop_rate": "stops",
}


def glance(measures: Mapping[str, float | None]) -> str:
    """A round's main measures in one line: "score 24.0, win rate 0.38 (0.21 to 0.55), KL 0.14, stops 0.81"."""
    values = [(key, name, measures.get(key)) for key, name in _GLANCE_NAMES.items()]
    return ", ".join(
        f"{name} {value:z.{1 if abs(value) >= 10 else 2}f}"
        + (_ends(measures) * (key == "win_rate"))
        for key, name, value in values
        if value is not None and math.isfinite(value)
    )


def _ends(measures: Mapping[str, float | None]) -> str:
    """The win rate's interval in brackets; nothing where it has none, or no width, as at the start."""
    low, high = (measures.get(name) for name in WIN_RATE_ENDS)
    return "" if low is None or high is None or low == high else f" ({low:.2f} to {high:.2f})"


def duration(seconds: float) -> str:
    """A time as text: "4.0 s", "41 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def arrow(before: float | None, after: float | None) -> str:
    """The direction of a value's change as one character; "" where a value is missing."""
    if before is None or after is None:
        return ""
    return "→" if before == after else "↑" if after > before else "↓"


def total_change(history: Sequence[float | None]) -> str:
    """The last value minus the first, with its sign; "" where either is missing."""
    first, last = history[0], history[-1]
    if len(history) < 2 or first is None or last is None:
        return ""
    text = format_values([*history, last - first])[-1]
    return text if text.startswith("-") else f"+{text}"


def in_colour(console: Console) -> bool:
    """Whether colours are seen there: not in a pipe, nor where NO_COLOR is set."""
    return console.color_system is not None and not console.no_color


def show_text(console: Console, body: str | Text) -> None:
    """Print a text literally: no markup, no wrapping, no emoji codes."""
    # Rich interprets markup and emoji codes in a str, but not in a Text.
    body = Text(body) if isinstance(body, str) else body
    console.print(body, soft_wrap=not console.is_terminal)
