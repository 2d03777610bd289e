"""Win rate against a fixed opponent (AROP §5.1): who scores higher, prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prefloop.errors import DataError, JudgeError
from prefloop.evaluate.stats import Estimate, bootstrap_mean


@dataclass(frozen=True)
class WinRate:
    """Wins, ties and losses over prompts, and what they come to."""

    estimate: Estimate | None
    """(wins + ties / 2) / judged, with its 95 % bootstrap interval; None where nothing was judged."""
    wins: int
    ties: int
    losses: int
    skipped: int
    """Prompts without a score on either side; they are in no other count."""


def points(own: float, other: float) -> float:
    """1 for a win of the first score, 1/2 for a tie, 0 for a loss."""
    return 1.0 if own > other else 0.5 if own == other else 0.0


def win_rate(
    scores: Sequence[float | None], opponent: Sequence[float | None], *, seed: int
) -> WinRate:
    """Share of prompts where an answer outscores the opponent's; ties count one half.

    Both sequences hold one judge's score per prompt, in the same prompt order, None where the judge
    gave no verdict. Swapping positions is the judge's business. Raises DataError on unequal lengths,
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


def steps_to(curve: Sequence[tuple[int, float]], share: float) -> int | None:
    """The first optimiser step at which a win rate reaches `share` of its run's highest (AROP, Table 1).

    `curve` holds (step, win rate); None where it is empty. It can be no finer than the steps it was taken at.
    """
    if not curve:
        return None
    bound = share * max(rate for _, rate in curve)
    return min(step for step, rate in curve if rate >= bound)
