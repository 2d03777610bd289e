"""The figures of a comparison's finished cells: means, costs, differences with tests, and a ranking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from prefloop.compare.file import Cell, Comparison
from prefloop.compare.judged import FurtherJudges
from prefloop.errors import RecipeError
from prefloop.evaluate.answers import prompt_values
from prefloop.evaluate.significance import (
    Contrast,
    crossed_contrast,
    holm,
    not_distinguishable,
    seed_contrast,
    seed_mean,
)
from prefloop.evaluate.stats import Estimate
from prefloop.recipe import load_recipe
from prefloop.records import Candidates
from prefloop.run.cost import SECONDS, Spent, round_seconds, spent
from prefloop.run_folder import RunDir, differences

LEVEL = 0.05
# With a smaller fraction of prompts in common, cells are not paired by prompt.
_MIN_COMMON_FRACTION = 0.8


@dataclass(frozen=True)
class _Result:
    """One finished cell."""

    cell: Cell
    round: int
    measures: Mapping[str, float | None]
    prompts: Mapping[str, Mapping[str, float]]
    """Measure -> prompt id -> value, for measures that are means over prompts."""
    cost: Spent
    rounds: Mapping[int, Mapping[str, float | None]]
    """Measures of each measured round, -1 is the start; with the round's seconds of generation and training."""


def tabulate(
    comparison: Comparison, cells: Sequence[Cell], failed: Mapping[str, str], folder: Path
) -> dict[str, Any]:
    """The contents of comparison.json: everything that the tables show.

    `folder` is the comparison's; verdicts of its further judges are kept there.
    """
    judges = FurtherJudges(comparison.judges, folder)
    results: dict[str, dict[int, _Result]] = {name: {} for name in comparison.variants}
    missing: dict[str, str] = {}
    for cell in cells:
        if reason := failed.get(cell.name) or _why_missing(cell):
            missing[cell.name] = reason
        else:
            results[cell.variant][cell.seed] = _read_result(cell, judges)
    played = {name: results_by_seed for name, results_by_seed in results.items() if results_by_seed}
    return {
        "note": comparison.note,
        "budget": comparison.budget.limits if comparison.budget else None,
        "seeds": list(comparison.seeds),
        "measures": list(comparison.measures),
        "control": comparison.control_name,
        "rank_by": comparison.rank_by,
        "variants": {
            name: _variant(comparison, results_by_seed) for name, results_by_seed in played.items()
        },
        "by_round": _by_round(comparison, played),
        "differences": _differences(comparison, played),
        "ranking": _ranking(comparison.rank_by, played),
        "missing": missing,
    }


def _why_missing(cell: Cell) -> str | None:
    """Why the cell's folder holds no result of its recipe; None where it does."""
    if not (cell.folder / "policy").is_dir():
        return "not played"
    try:
        # Read as a recipe, so that options added in later versions have their defaults.
        played = load_recipe(str(cell.folder / "recipe.yaml"))
    except RecipeError as error:
        return str(error)
    changes = differences(played.model_dump(mode="json"), cell.recipe.model_dump(mode="json"))
    return f"played with another recipe ({'; '.join(changes[:5])})" if changes else None


def _read_result(cell: Cell, judges: FurtherJudges) -> _Result:
    run = RunDir(cell.folder)
    result = run.results()[-1]
    last = next(round_dir for round_dir in run.rounds() if round_dir.number == result.round)
    answers, before = (part.records("answers", Candidates) for part in (last, run.start))
    judged, judged_by_prompt = judges.measures(answers, before, seed=cell.seed)
    return _Result(
        cell,
        result.round,
        {**result.measures, **judged},
        {**prompt_values(answers, before), **judged_by_prompt},
        spent(run, cell.recipe),
        {
            one.round: {**one.measures, **round_seconds(run.round(one.round))}
            for one in run.results()
        },
    )


def _variant(comparison: Comparison, results: Mapping[int, _Result]) -> dict[str, Any]:
    cells = {
        str(seed): {
            "folder": str(result.cell.folder),
            "round": result.round,
            "measures": dict(result.measures),
            "cost": asdict(result.cost),
        }
        for seed, result in results.items()
    }
    measures = {}
    for name in comparison.measures:
        values = _values(name, results)
        measures[name] = _json_values(seed_mean(list(values.values()))) if values else None
    return {"cells": cells, "measures": measures, "cost": _cost(comparison, list(results.values()))}


def _json_values(estimate: Estimate) -> dict[str, Any]:
    """The estimate as JSON values, NaN as null."""
    return {k: None if math.isnan(v) else v for k, v in asdict(estimate).items()}


def _cost(comparison: Comparison, results: Sequence[_Result]) -> dict[str, Any]:
    """Means over the cells; for memory the maximum."""
    costs = [result.cost for result in results]
    stages = dict.fromkeys(stage for cost in costs for stage in cost.seconds_by_stage)
    return {
        "generated_tokens": fmean(cost.generated_tokens for cost in costs),
        "trained_tokens": fmean(cost.trained_tokens for cost in costs),
        "flops": fmean(cost.flops for cost in costs),
        "seconds": {
            stage: fmean(cost.seconds_by_stage.get(stage, 0.0) for cost in costs)
            for stage in stages
        },
        "peak_memory_mb": max(cost.peak_memory_mb for cost in costs),
        "rounds": fmean(result.round + 1 for result in results),
        "budget_used": fmean(cost.fraction_used(comparison.budget) for cost in costs)
        if comparison.budget
        else None,
    }


def _by_round(
    comparison: Comparison, played: Mapping[str, Mapping[int, _Result]]
) -> dict[str, list[dict[str, Any]]]:
    """Variant -> its rounds in order: each seed's value, and their mean, of the measures of `by_round`."""
    names = (*comparison.by_round, *SECONDS) if comparison.by_round else ()
    table: dict[str, list[dict[str, Any]]] = {}
    for variant, results in played.items() if names else ():
        rounds = sorted({number for result in results.values() for number in result.rounds})
        table[variant] = []
        for number in rounds:
            measures = {}
            for name in names:
                by_seed = {
                    str(seed): value
                    for seed, result in results.items()
                    if (value := result.rounds.get(number, {}).get(name)) is not None
                }
                mean = _json_values(seed_mean(list(by_seed.values()))) if by_seed else None
                measures[name] = {"by_seed": by_seed, "mean": mean}
            table[variant].append({"round": number, "measures": measures})
    return table


def _values(name: str, results: Mapping[int, _Result]) -> dict[int, float]:
    values = {seed: result.measures.get(name) for seed, result in results.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def _contrast(
    name: str, first: Mapping[int, _Result], second: Mapping[int, _Result]
) -> Contrast | None:
    """First minus second, paired by seed, and by prompt where the measure is a mean over prompts."""
    first_values, second_values = _values(name, first), _values(name, second)
    seeds = [seed for seed in first_values if seed in second_values]
    by_prompt = [
        (first[seed].prompts.get(name, {}), second[seed].prompts.get(name, {})) for seed in seeds
    ]
    all_values = [values for pair in by_prompt for values in pair]
    common = set(all_values[0]).intersection(*all_values[1:]) if all_values else set()
    if common and len(common) >= _MIN_COMMON_FRACTION * max(map(len, all_values)):
        order = sorted(common)
        differences = [[one[p] - other[p] for p in order] for one, other in by_prompt]
        if (contrast := crossed_contrast(np.asarray(differences))) is not None:
            return contrast
    return seed_contrast([first_values[s] for s in seeds], [second_values[s] for s in seeds])


def _differences(
    comparison: Comparison, played: Mapping[str, Mapping[int, _Result]]
) -> dict[str, dict[str, Any]]:
    """Measure -> variant -> its difference from the control; p-values are corrected within each measure."""
    control = played.get(comparison.control_name)
    table: dict[str, dict[str, Any]] = {}
    for name in comparison.measures if control else ():
        contrasts = {
            variant: _contrast(name, results, control)
            for variant, results in played.items()
            if control is not None and variant != comparison.control_name
        }
        known = {
            variant: contrast for variant, contrast in contrasts.items() if contrast is not None
        }
        corrected = holm([contrast.p for contrast in known.values()])
        table[name] = {
            variant: {**asdict(contrast), "p_holm": p, "real": p < LEVEL}
            for (variant, contrast), p in zip(known.items(), corrected, strict=True)
        }
    return table


def _ranking(name: str, played: Mapping[str, Mapping[int, _Result]]) -> dict[str, Any]:
    """Variants by their mean, and the sets whose members are not distinguishable; Holm over all pairs."""
    means = {
        variant: fmean(values.values())
        for variant, results in played.items()
        if (values := _values(name, results))
    }
    order = sorted(means, key=lambda variant: -means[variant])
    contrasts = {
        (one, other): _contrast(name, played[one], played[other])
        for one, other in combinations(order, 2)
    }
    known = {pair: results for pair, results in contrasts.items() if results is not None}
    corrected = dict(zip(known, holm([results.p for results in known.values()]), strict=True))
    differ = {frozenset(pair): p < LEVEL for pair, p in corrected.items()}
    return {
        "order": [{"variant": variant, "mean": means[variant]} for variant in order],
        "groups": [list(group) for group in not_distinguishable(order, differ)],
        "pairs": [
            {"first": one, "second": other, **asdict(known[one, other]), "p_holm": p}
            for (one, other), p in corrected.items()
        ],
    }
