"""Win rates of answers against an opponent's, plain and length-controlled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prefloop.errors import DataError, JudgeError
from prefloop.evaluate.stats import Estimate, block_sizes, bootstrap_mean


@dataclass(frozen=True)
class WinRate:
    """Wins, ties and losses over prompts, and the win rate that follows from them."""

    estimate: Estimate | None
    """(wins + ties / 2) / judged, with its 95 % bootstrap interval; None where nothing was judged."""
    wins: int
    ties: int
    losses: int
    skipped: int
    """Prompts where one side or both have no score; they are in no other count."""


def points(own: float, other: float) -> float:
    """1 for a win of the first score, 1/2 for a tie, 0 for a loss."""
    return 1.0 if own > other else 0.5 if own == other else 0.0


def win_rate(
    scores: Sequence[float | None], opponent: Sequence[float | None], *, seed: int
) -> WinRate:
    """Share of prompts where an answer outscores the opponent's; ties count one half.

    Both sequences hold one judge's score per prompt, in the same prompt order, None where the judge
    gave no verdict. Position bias is the judge's to remove. Raises DataError on unequal lengths,
    JudgeError on a NaN score.
    """
    if len(scores) != len(opponent):
        raise DataError(
            f"a win rate got {len(scores)} scores against the opponent's {len(opponent)}; "
            "score the same prompts on both sides"
        )
    outcomes = []
    for row, (own, other) in enumerate(zip(scores, opponent, strict=True)):
        if own is None or other is None:
            continue
        if math.isnan(own) or math.isnan(other):
            raise JudgeError(
                f"the judge scored prompt {row} with NaN, which neither wins nor loses; "
                "check the judge's model and its dtype"
            )
        outcomes.append(points(own, other))
    return WinRate(
        estimate=bootstrap_mean(outcomes, seed=seed),
        wins=outcomes.count(1.0),
        ties=outcomes.count(0.5),
        losses=outcomes.count(0.0),
        skipped=len(scores) - len(outcomes),
    )


def steps_to(curve: Sequence[tuple[int, float]], fraction: float) -> int | None:
    """The first optimiser step at which a win rate reaches `fraction` of its run's highest (AROP, Table 1).

    `curve` holds (step, win rate); None where it is empty. The answer is one of the curve's steps.
    """
    if not curve:
        return None
    threshold = fraction * max(rate for _, rate in curve)
    return min(step for step, rate in curve if rate >= threshold)


Floats: TypeAlias = NDArray[np.float64]

_PRIOR_PRECISION = 1.0
"""Precision of b's prior: where only the longer answers win, b would grow without end."""

_NEWTON_STEPS = 50

_MAX_LOGIT = 15.0
"""Bound on |a|: where every answer wins, the likelihood has no maximum; sigma(15) is 1 to six digits."""


def length_controlled(
    points: Sequence[float],
    lengths: Sequence[float],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 1000,
) -> Estimate | None:
    """The win rate at equal lengths, sigma(a) of a logistic fit sigma(a + b z); None where there is no prompt.

    z is tanh(length difference / its standard deviation); the interval is a percentile bootstrap over prompts.
    `points` are 1 for a win, 0 for a loss, 1/2 for a tie; `lengths` is own length minus the opponent's, in
    any unit. Fitted by maximum likelihood with a normal prior N(0, 1) on b, so that it exists where wins and
    lengths go together perfectly. Where lengths never differ, or do not vary, it is the plain win rate.
    """
    points_N, lengths_N = np.asarray(points, dtype=float), np.asarray(lengths, dtype=float)
    assert points_N.shape == lengths_N.shape
    count = len(points_N)
    if not count:
        return None
    spread = float(lengths_N.std())
    z_N = np.tanh(lengths_N / spread) if spread > 0 else np.zeros(count)
    value = _at_equal_lengths(np.ones((1, count)), points_N, z_N)[0]
    generator = np.random.default_rng(seed)
    resampled = []
    for size in block_sizes(resamples, count):
        weights_SN = generator.multinomial(count, np.full(count, 1 / count), size=size)
        resampled.append(_at_equal_lengths(weights_SN.astype(float), points_N, z_N))
    low, high = np.quantile(np.concatenate(resampled), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(
        float(value), min(float(low), float(value)), max(float(high), float(value)), count
    )


def _at_equal_lengths(weights_SN: Floats, points_N: Floats, z_N: Floats) -> Floats:
    """sigma(a) of each row of weights, by Newton's method on both coefficients of all rows at once."""
    a_S, b_S = np.zeros(len(weights_SN)), np.zeros(len(weights_SN))
    for _ in range(_NEWTON_STEPS):
        p_SN = _sigma(a_S[:, None] + b_S[:, None] * z_N)
        gap_SN = weights_SN * (points_N - p_SN)
        curve_SN = weights_SN * p_SN * (1 - p_SN)
        slope_a, slope_b = gap_SN.sum(axis=1), (gap_SN * z_N).sum(axis=1) - _PRIOR_PRECISION * b_S
        # A little on the diagonal: where all is won the curvature in a goes to 0.
        aa = curve_SN.sum(axis=1) + 1e-9
        ab = (curve_SN * z_N).sum(axis=1)
        bb = (curve_SN * z_N**2).sum(axis=1) + _PRIOR_PRECISION
        scale = aa * bb - ab**2
        step_a = np.clip((bb * slope_a - ab * slope_b) / scale, -1, 1)
        step_b = np.clip((aa * slope_b - ab * slope_a) / scale, -1, 1)
        a_S = np.clip(a_S + step_a, -_MAX_LOGIT, _MAX_LOGIT)
        b_S = b_S + step_b
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-9:
            break
    return _sigma(a_S)


def _sigma(values: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-values)), dtype=np.float64)


def has_stalled(win_rates: Sequence[float], patience: int, threshold: float) -> bool:
    """Whether `patience` win rates in a row were, at some point, not better by more than `threshold` than the best before
    each, as transformers' EarlyStoppingCallback counts."""
    best, waiting = float("-inf"), 0
    for value in win_rates:
        waiting = 0 if value > best + threshold else waiting + 1
        best = max(best, value)
        if waiting >= patience:
            return True
    return False
