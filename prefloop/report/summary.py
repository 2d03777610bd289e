"""Output at the end of a run and of `prefloop show`: the table of rounds, some pairs, next commands."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from prefloop.data.text_distance import fold_whitespace
from prefloop.errors import RunFolderError
from prefloop.evaluate.curves import FRACTION_OF_BEST, steps_to_fraction, win_rate_curve
from prefloop.records import CurvePoint, Pair, RoundResult
from prefloop.report.chain import Chain, round_chains, show_chain
from prefloop.report.console import (
    MEASURES,
    WIN_RATE_ENDS,
    measure_names,
    show_pair,
    show_rounds,
    show_text,
)
from prefloop.report.facts import read_ratios
from prefloop.report.formats import show_table
from prefloop.report.meanings import legend
from prefloop.run_folder import REJECTS, RunDir, read_run

if TYPE_CHECKING:
    from prefloop.run_folder import Outcome

_SHOWN_PAIRS = 3
_SHOWN_POINTS = 12


def show_outcome(outcome: Outcome, console: Console) -> None:
    """Print the table of rounds, three pairs of the last round, the policy's folder and next commands."""
    run = RunDir(outcome.folder)
    _show_results(outcome.results, console)
    show_curve(win_rate_curve(run), console)
    _show_pairs(list(islice(_differing(run.pairs()[-1][1]), _SHOWN_PAIRS)), console)
    page = outcome.folder / "report.html"
    lines = [
        f"policy   {outcome.policy}",
        f"measures {outcome.folder}/rounds/*/result.jsonl",
        *(
            [f"report   {page}    open it in a browser: curves, rejects, every pair"]
            * page.exists()
        ),
        f"next     prefloop show {outcome.folder} -n 10    more pairs",
        *(
            [f"         prefloop export {outcome.folder} pairs.jsonl    pairs for TRL"]
            * any(pair.exportable for _, pairs in run.pairs() for pair in pairs)
        ),
    ]
    console.print(Text("\n" + "\n".join(lines)), soft_wrap=True)


def outcome_json(outcome: Outcome) -> str:
    """The outcome as JSON: paths of policy and report, and the measures by round."""
    page = outcome.folder / "report.html"
    values = {
        "folder": str(outcome.folder),
        "policy": str(outcome.policy),
        "report": str(page) if page.exists() else None,
        "results": [result.model_dump() for result in outcome.results],
    }
    return json.dumps(values, indent=1)


def show_run(folder: Path, console: Console, *, pair: str | None, count: int) -> None:
    """Print the table and the newest `count` pairs, or the chains of one pair or prompt. Raises RunFolderError."""
    run = read_run(folder)
    if pair is not None:
        for chain in _chains_of(run, pair):
            console.print()
            show_chain(chain, console)
        return
    _show_results(run.results(), console)
    show_curve(win_rate_curve(run), console)
    _show_pairs(_newest([_differing(pairs) for _, pairs in run.pairs()], count), console)
    for line in _without_pairs(run):
        show_text(console, line)


def _without_pairs(run: RunDir) -> Iterator[str]:
    """A line for each round whose prompts gave no pair: how many, and why."""
    for round_dir in run.rounds():
        facts = round_dir.manifest("pairs")
        reasons = round_dir.reasons() if facts is not None else Counter[str]()
        if reasons and next(round_dir.stream("pairs", Pair), None) is None:
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            yield (
                f"round {round_dir.number} made no pairs ({why}); {round_dir.path}/{REJECTS} says more"
            )


def run_json(folder: Path, *, pair: str | None, count: int) -> str:
    """The contents of `show_run` as one JSON object. Raises RunFolderError."""
    run = read_run(folder)
    if pair is not None:
        return json.dumps(
            {"chains": [chain.to_json() for chain in _chains_of(run, pair)]}, indent=1
        )
    newest = _newest([pairs for _, pairs in run.pairs()], count)
    values = {
        "folder": str(folder),
        "results": [result.model_dump() for result in run.results()],
        "win_rate_curve": [point.model_dump() for point in win_rate_curve(run)],
        "rejects": {round_dir.number: dict(round_dir.reasons()) for round_dir in run.rounds()},
        "pairs": [{"id": one.id, **one.model_dump(mode="json")} for one in newest],
    }
    return json.dumps(values, indent=1)


def _newest(pairs: Sequence[Iterable[Pair]], count: int) -> list[Pair]:
    """The last `count` pairs of all rounds, newest first; the rounds are read from the last one back."""
    found: list[Pair] = []
    for of_round in reversed(pairs):
        if len(found) >= count:
            break
        found += reversed(deque(of_round, maxlen=count - len(found)))
    return found


def _differing(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Those whose two answers differ in more than white space: of the others there is nothing to show."""
    for pair in pairs:
        if fold_whitespace(pair.chosen) != fold_whitespace(pair.rejected):
            yield pair


def _chains_of(run: RunDir, pair_id: str) -> list[Chain]:
    """The chains of a pair's id, or of a prompt's id over all rounds."""
    matching = [
        chain for chain in _chains(run) if pair_id in (chain.id, chain.id.partition("/")[2])
    ]
    if not matching:
        first = next((chain.id for chain in islice(_chains(run), 1)), "0000/prompt-id")
        raise RunFolderError(
            f"{run.path} has no pair {pair_id!r}; ids look like {first!r}, see rounds/*/pairs.jsonl"
        )
    return matching


def _chains(run: RunDir) -> Iterator[Chain]:
    ratios = {pair_ratios.pair: pair_ratios for pair_ratios in read_ratios(run)}
    for round_dir in run.rounds():
        yield from round_chains(round_dir, ratios)


def _show_results(results: list[RoundResult], console: Console) -> None:
    known = [
        RoundResult(
            round=result.round,
            measures={k: v for k, v in result.measures.items() if k in (*MEASURES, *WIN_RATE_ENDS)},
        )
        for result in results
    ]
    console.print()
    show_rounds(known, console)
    if lines := legend(measure_names(known)):
        console.print()
        console.print(Text("\n".join(lines), style="dim"), soft_wrap=True)


def show_curve(points: list[CurvePoint], console: Console) -> None:
    """Print at most twelve points of the win rate during training, and the step of 90 % of its highest."""
    if not points:
        return
    # Evenly spaced points, counted back from the last one, which is always shown.
    stride = -(-len(points) // _SHOWN_POINTS)
    shown = list(reversed(points[::-1][::stride]))
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
    if (step := steps_to_fraction(points)) is not None:
        console.print(Text(f"steps to {FRACTION_OF_BEST:.0%} of the highest win rate: {step}"))


def _three_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _show_pairs(pairs: list[Pair], console: Console) -> None:
    for pair in pairs:
        console.print()
        show_pair(pair, console)
