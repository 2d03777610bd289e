"""Training curves of a run: the loss's metrics at each optimiser step, and the win rate at every k-th."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prefloop.evaluate.win_rates import has_stalled, steps_to
from prefloop.recipe.options import EvaluateOptions
from prefloop.records import CurvePoint
from prefloop.run_folder import RoundDir, RunDir

CURVE = "curve"
FRACTION_OF_BEST = 0.9
"""Fraction of the run's highest win rate that "steps to 90 %" (AROP, Table 1) refers to."""


def win_rate_curve(run: RunDir) -> list[CurvePoint]:
    """The win rate during training of all rounds, in order; [] where the recipe did not ask for it."""
    return [
        point
        for round_dir in run.rounds()
        if (round_dir.path / f"{CURVE}.jsonl").is_file()
        for point in round_dir.records(CURVE, CurvePoint)
    ]


def has_ended_early(points: Iterable[CurvePoint], options: EvaluateOptions) -> bool:
    """Whether the win rate has not risen for as long as `early_stopping_patience` allows."""
    rates = [point.win_rate for point in points if point.win_rate is not None]
    patience = options.early_stopping_patience
    return patience is not None and has_stalled(rates, patience, options.early_stopping_threshold)


def steps_to_fraction(points: list[CurvePoint]) -> int | None:
    """The first step at which the win rate reaches 90 % of its highest; None without a win rate."""
    return steps_to(
        [(p.step, p.win_rate) for p in points if p.win_rate is not None], FRACTION_OF_BEST
    )


def training_curve(round_dir: RoundDir) -> list[dict[str, Any]]:
    """What each optimiser step of a round logged: loss, margin, real_reward ...; [] before its training."""
    return list(round_dir.metrics())


def curves(run: RunDir) -> dict[str, Any]:
    """Both curves as JSON values: `training` by round, `win_rate`, and `steps_to_90`."""
    points = win_rate_curve(run)
    return {
        "training": {
            str(round_dir.number): training_curve(round_dir) for round_dir in run.rounds()
        },
        "win_rate": [point.model_dump() for point in points],
        "steps_to_90": steps_to_fraction(points),
    }
