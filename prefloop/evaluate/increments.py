"""The leaderboard over successive rounds: each round's values and their gains over the round before."""

from __future__ import annotations

from collections.abc import Mapping

from prefloop.errors import DataError
from prefloop.evaluate.measures import Outcome
from prefloop.evaluate.measures.leaderboard import BENCHMARKS, MEAN, stratum_of
from prefloop.evaluate.stats import Estimate, mean_difference, mean_of

_HEADINGS = {
    "arc_challenge": "ARC-c",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "truthfulqa_mc2": "TruthfulQA",
    "winogrande": "Winogrande",
    "gsm8k": "GSM8K",
    MEAN: "mean",
}


def increments(before: Outcome, after: Outcome) -> dict[str, Estimate]:
    """After minus before by benchmark, and for the mean of all six, on the questions that both results hold.

    Raises DataError where they have no question in common, or the same questions in other prompts (which can be
    seen only where the questions are all the same).
    """
    prompts = [(outcome.facts or {}).get("prompts") for outcome in (before, after)]
    earlier = {item.id: item for item in before.items}
    pairs = [(earlier[item.id], item) for item in after.items if item.id in earlier]
    if not pairs:
        raise DataError(
            "the two leaderboard results share no question; measure both with the same tasks, items and seed"
        )
    if len(pairs) == len(before.items) == len(after.items) and prompts[0] != prompts[1]:
        raise DataError(
            "the two leaderboard results come from other prompts (data, harness or chat template have changed); "
            "measure both again"
        )
    gains: dict[str, Estimate] = {}
    for benchmark in BENCHMARKS:
        strata: dict[str, list[float]] = {}
        for old, new in pairs:
            if new.group == benchmark:
                change = new.values[benchmark] - old.values[benchmark]
                strata.setdefault(stratum_of(new), []).append(change)
        if strata:
            gains[benchmark] = mean_difference(strata)
    if len(gains) == len(BENCHMARKS):
        gains[MEAN] = mean_of(list(gains.values()))
    return gains


def rounds_table(outcomes: Mapping[str, Outcome]) -> list[list[str]]:
    """A header and one row per outcome: values in per cent, in brackets the gain over the row above.

    A gain whose 95 % interval holds 0 is followed by "~": it may be chance.
    """
    shown = [name for name in _HEADINGS if any(name in o.estimates for o in outcomes.values())]
    rows = [["", *(_HEADINGS[name] for name in shown)]]
    before: Outcome | None = None
    for label, outcome in outcomes.items():
        gains = increments(before, outcome) if before else {}
        rows.append([label, *(_cell(outcome.estimates.get(n), gains.get(n)) for n in shown)])
        before = outcome
    return rows


def _cell(value: Estimate | None, gain: Estimate | None) -> str:
    if value is None:
        return "-"
    text = f"{100 * value.value:.1f}"
    if gain is None:
        return text
    chance = "~" if gain.low <= 0 <= gain.high else ""
    return f"{text} ({100 * gain.value:+.1f}{chance})"
