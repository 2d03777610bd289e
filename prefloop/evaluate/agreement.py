"""How a judge agrees with people on pairs of answers, how its mistakes lean, and how sure it may be.

Everything here takes scores; who gave them does not matter. N pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefloop.evaluate.stats import Estimate, clustered_mean, wilson


@dataclass(frozen=True)
class Scored:
    """A pair as people labelled it and a judge scored it."""

    cluster: str
    """Equal for pairs that share their prompt."""
    tie: bool
    """Whether people call it a tie; then which answer is which means nothing."""
    chosen_length: int
    """Characters."""
    rejected_length: int
    scores: tuple[float, float] | str
    """The judge's scores of the chosen and of the rejected answer, or why it gave none."""


@dataclass(frozen=True)
class Agreement:
    """What one judge did on one data set; shares are None where no pair is left to count."""

    pairs: int
    """All pairs, human ties and failures among them."""
    agreement: Estimate | None
    """Share of people's choices that the judge shares; a judge's tie counts one half."""
    over_longer: Estimate | None
    """Agreement minus that of "the longer one", on the same pairs."""
    prefers_longer: Estimate | None
    """Share of pairs of unequal length where the judge prefers the longer answer."""
    people_prefer_longer: float | None
    """The same share for people, on the same pairs."""
    where_longer_is_better: Estimate | None
    """Agreement on the pairs where people prefer the longer answer."""
    where_shorter_is_better: Estimate | None
    """Agreement on the pairs where people prefer the shorter answer."""
    length_correlation: float | None
    """Spearman's, of the difference of scores and the difference of lengths."""
    ties: Estimate | None
    """Share of scored pairs with equal scores."""
    human_ties: int
    """Pairs that people call a tie; in no other figure but `pairs`, `ties` and `failures`."""
    failures: Estimate | None
    """Share of pairs without a verdict."""
    reasons: dict[str, int]
    """Why there was none -> pairs."""


def agreement(rows: Sequence[Scored], *, seed: int = 0) -> Agreement:
    """Compare one judge's scores with people's labels; failures are counted and left out.

    All intervals are 95 %. Agreement is resampled by prompt, since pairs of one prompt are not independent.
    """
    judged = [row for row in rows if not isinstance(row.scores, str)]
    decided = [row for row in judged if not row.tie]
    unequal = [row for row in decided if row.chosen_length != row.rejected_length]
    differences = [_difference(row) for row in decided]
    clusters = [row.cluster for row in decided]
    right = [_points(value) for value in differences]
    longer = [_points(row.chosen_length - row.rejected_length) for row in decided]
    by_length = {
        sign: [
            (_points(_difference(row)), row.cluster)
            for row in unequal
            if (row.chosen_length > row.rejected_length) == sign
        ]
        for sign in (True, False)
    }
    leans = [
        (_points(_difference(row) * (row.chosen_length - row.rejected_length)), row.cluster)
        for row in unequal
    ]
    ties = sum(_difference(row) == 0 for row in judged)
    return Agreement(
        pairs=len(rows),
        agreement=clustered_mean(right, clusters, seed=seed),
        over_longer=clustered_mean(
            [a - b for a, b in zip(right, longer, strict=True)], clusters, seed=seed
        ),
        prefers_longer=_mean(leans, seed),
        people_prefer_longer=len(by_length[True]) / len(unequal) if unequal else None,
        where_longer_is_better=_mean(by_length[True], seed),
        where_shorter_is_better=_mean(by_length[False], seed),
        length_correlation=spearman(
            differences, [row.chosen_length - row.rejected_length for row in decided]
        ),
        ties=wilson(ties, len(judged)),
        human_ties=sum(row.tie for row in rows),
        failures=wilson(len(rows) - len(judged), len(rows)),
        reasons=dict(Counter(row.scores for row in rows if isinstance(row.scores, str))),
    )


def position_bias(
    forward: Sequence[Scored], exchanged: Sequence[Scored]
) -> dict[str, float] | None:
    """What the order of the answers does to a judge, from the same pairs in both orders; None without any.

    `first_wins` is how often the answer that is shown first gets the higher score (ties one half; 0.5 is
    no bias), `changed` the share of pairs whose winner depends on the order. In `forward` the chosen answer was
    shown first, in `exchanged` the rejected one; scores are the chosen's and the rejected's in both.
    """
    points = [
        (_points(_difference(a)), _points(_difference(b)))
        for a, b in zip(forward, exchanged, strict=True)
        if not isinstance(a.scores, str) and not isinstance(b.scores, str)
    ]
    if not points:
        return None
    return {
        "first_wins": sum(a + 1 - b for a, b in points) / (2 * len(points)),
        "changed": sum(a != b for a, b in points) / len(points),
        "pairs": float(len(points)),
    }


@dataclass(frozen=True)
class Bin:
    """Pairs of like confidence: how sure the scores were, and how often they were right."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Whether sigma(score difference) is the probability of being right (Bradley-Terry)."""

    bins: tuple[Bin, ...]
    """The reliability curve; empty bins are left out."""
    ece: float
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): mean gap over the bins, by pairs."""
    brier: float
    """Mean squared error of the probability of people's choice; 0.25 is a coin's."""
    log_loss: float
    """Mean -log of that probability, in nats; 0.693 is a coin's."""


def calibration(rows: Sequence[Scored], *, bins: int = 10) -> Calibration | None:
    """Reliability of a Bradley-Terry judge on the pairs that it scored and people decided; None without any.

    Confidence is the probability of the judge's own choice, so the bins cover 0.5 to 1.
    """
    differences_N = np.array(
        [_difference(row) for row in rows if not row.tie and not isinstance(row.scores, str)]
    )
    if not len(differences_N):
        return None
    confidence_N = 1 / (1 + np.exp(-np.abs(differences_N)))
    right_N = np.where(differences_N == 0, 0.5, differences_N > 0)
    chosen_N = np.where(differences_N >= 0, confidence_N, 1 - confidence_N)
    place_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    found = [
        Bin(
            low=0.5 + number / (2 * bins),
            high=0.5 + (number + 1) / (2 * bins),
            pairs=int((place_N == number).sum()),
            confidence=float(confidence_N[place_N == number].mean()),
            accuracy=float(right_N[place_N == number].mean()),
        )
        for number in range(bins)
        if (place_N == number).any()
    ]
    gaps = [bin.pairs * abs(bin.confidence - bin.accuracy) for bin in found]
    return Calibration(
        bins=tuple(found),
        ece=sum(gaps) / len(differences_N),
        brier=float(((1 - chosen_N) ** 2).mean()),
        log_loss=float(np.logaddexp(0, -differences_N).mean()),
    )


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None where one side does not vary."""
    if len(first) < 2 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return [float(rank) for rank in ((ends - counts + 1 + ends) / 2)[places]]


def _difference(row: Scored) -> float:
    assert not isinstance(row.scores, str)
    difference = row.scores[0] - row.scores[1]
    assert math.isfinite(difference)
    return difference


def _points(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


def _mean(values: Sequence[tuple[float, str]], seed: int) -> Estimate | None:
    return clustered_mean([v for v, _ in values], [c for _, c in values], seed=seed)
