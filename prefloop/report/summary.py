"""The end of a run, and a look back at one: the table of rounds, some pairs, and what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from prefloop.curves import SHARE, steps_to_share, win_rate_curve
from prefloop.errors import RunFolderError
from prefloop.records import CurvePoint, Pair, RoundResult
from prefloop.report.console import MEASURES, show_pair, show_rounds
from prefloop.report.plain_table import show_table
from prefloop.rundir import RunDir, read_run

if TYPE_CHECKING:
    from prefloop.loop import Outcome

_SHOWN_PAIRS = 3
_SHOWN_POINTS = 12


def show_outcome(outcome: Outcome, console: Console) -> None:
    """The table, three pairs of the last round, where the policy lies, and what can be done with it."""
    run = RunDir(outcome.folder)
    _show_results(outcome.results, console)
    show_curve(win_rate_curve(run), console)
    _show_pairs(run.pairs()[-1][1][:_SHOWN_PAIRS], console)
    lines = [
        f"policy   {outcome.policy}",
        f"measures {outcome.folder}/rounds/*/result.jsonl",
        f"next     prefloop show {outcome.folder} -n 10    more pairs",
        f"         prefloop export {outcome.folder} pairs.jsonl    pairs for TRL",
    ]
    console.print(Text("\n" + "\n".join(lines)), soft_wrap=True)


def show_run(folder: Path, console: Console, *, pair: str | None, count: int) -> None:
    """The table and `count` pairs, or the one pair asked for. Raises RunFolderError."""
    run = read_run(folder)
    pairs = [found for _, round_pairs in run.pairs() for found in round_pairs]
    if pair is not None:
        chosen = [found for found in pairs if pair in (found.id, found.prompt_id)]
        if not chosen:
            raise RunFolderError(
                f"{folder} has no pair {pair!r}; ids look like "
                f"{pairs[0].id if pairs else '0000/prompt-id'!r}, see rounds/*/pairs.jsonl"
            )
        _show_pairs(chosen, console)
        return
    _show_results(run.results(), console)
    show_curve(win_rate_curve(run), console)
    # The newest pairs tell most about where the policy is.
    _show_pairs(list(reversed(pairs))[:count], console)


def _show_results(results: list[RoundResult], console: Console) -> None:
    known = [
        RoundResult(
            round=result.round,
            measures={k: v for k, v in result.measures.items() if k in MEASURES},
        )
        for result in results
    ]
    console.print()
    show_rounds(known, console)


def show_curve(points: list[CurvePoint], console: Console) -> None:
    """Print the win rate during training, at most twelve points of it, and when it reached 90 % of its highest."""
    if not points:
        return
    # The last one always, the others as evenly as they can lie.
    gap = -(-len(points) // _SHOWN_POINTS)
    shown = list(reversed(points[::-1][::gap]))
    rows = [
        [
            str(point.step),
            str(point.round),
            *(
                _three_digits(value)
                for value in (point.win_rate, point.low, point.high, point.score)
            ),
        ]
        for point in shown
    ]
    console.print()
    show_table(("step", "round", "win_rate", "95 % from", "to", "score"), rows, console)
    if (step := steps_to_share(points)) is not None:
        console.print(Text(f"steps to {SHARE:.0%} of the highest win rate: {step}"))


def _three_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _show_pairs(pairs: list[Pair], console: Console) -> None:
    for pair in pairs:
        console.print()
        show_pair(pair, console)
