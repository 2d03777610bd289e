"""A judge against human labels on pairs of answers: agreement, biases (length, position), calibration.

Everything here takes scores, whatever judge gave them. N pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from prefloop.evaluate.stats import Estimate, clustered_mean, wilson


@dataclass(frozen=True)
class Scored:
    """A pair with its human label and a judge's scores."""

    cluster: str
    """The same name for all pairs of one prompt, which are not independent."""
    tie: bool
    """Whether people call it a tie; then chosen and rejected are arbitrary."""
    chosen_length: int
    """Characters of the chosen answer."""
    rejected_length: int
    scores: tuple[float, float] | str
    """The judge's scores of the chosen and of the rejected answer, or why it gave none."""


@dataclass(frozen=True)
class Agreement:
    """One judge's figures on one data set; None where no pair is left to count."""

    pairs: int
    """All pairs, with human ties and failures."""
    agreement: Estimate | None
    """Proportion of human choices that the judge makes too; a judge's tie counts one half."""
    over_longer: Estimate | None
    """Agreement minus that of always choosing the longer answer, on the same pairs."""
    prefers_longer: Estimate | None
    """Share of pairs of unequal length where the judge prefers the longer answer."""
    people_prefer_longer: float | None
    """The same proportion for people, on the same pairs."""
    where_longer_is_better: Estimate | None
    """Agreement on the pairs where people prefer the longer answer."""
    where_shorter_is_better: Estimate | None
    """Agreement on the pairs where people prefer the shorter answer."""
    length_correlation: float | None
    """Spearman's correlation of the difference of scores with the difference of lengths."""
    ties: Estimate | None
    """Share of scored pairs with equal scores."""
    human_ties: int
    """Pairs that people call a tie; in no other figure but `pairs`, `ties` and `failures`."""
    failures: Estimate | None
    """Share of pairs without a verdict."""
    reasons: dict[str, int]
    """Pairs without a verdict, counted by reason."""


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
    """How a judge's verdicts depend on the order of the answers, from the same pairs in both orders; None without any.

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
    """Pairs of similar confidence: mean confidence, and accuracy against the human labels."""

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
    bin_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    filled_bins = [
        Bin(
            low=0.5 + index / (2 * bins),
            high=0.5 + (index + 1) / (2 * bins),
            pairs=int((bin_N == index).sum()),
            confidence=float(confidence_N[bin_N == index].mean()),
            accuracy=float(right_N[bin_N == index].mean()),
        )
        for index in range(bins)
        if (bin_N == index).any()
    ]
    gaps = [bin.pairs * abs(bin.confidence - bin.accuracy) for bin in filled_bins]
    return Calibration(
        bins=tuple(filled_bins),
        ece=sum(gaps) / len(differences_N),
        brier=float(((1 - chosen_N) ** 2).mean()),
        log_loss=float(np.logaddexp(0, -differences_N).mean()),
    )


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's; None where one side does not vary."""
    varies = len(set(first)) > 1 and len(set(second)) > 1
    return float(spearmanr(first, second).statistic) if varies else None


def _difference(row: Scored) -> float:
    assert not isinstance(row.scores, str)
    difference = row.scores[0] - row.scores[1]
    assert math.isfinite(difference)
    return difference


def _points(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


def _mean(values: Sequence[tuple[float, str]], seed: int) -> Estimate | None:
    return clustered_mean([v for v, _ in values], [c for _, c in values], seed=seed)


_Floats = NDArray[np.float64]

_RESAMPLES, _LEVEL = 2000, 0.95


def cohen_kappa(
    first: Sequence[Hashable], second: Sequence[Hashable], *, seed: int = 0
) -> Estimate | None:
    """Cohen's kappa of two raters who each put the same U units into one of K unordered categories.

    (p_o - p_e) / (1 - p_e), with p_o the share of units on which they agree and p_e what it would be if
    each rater's labels were shuffled. Source: Cohen (1960), Educ. Psychol. Meas. 20(1). None without units, and
    where both used one and the same category only, since then p_e = 1.
    """
    assert len(first) == len(second)
    category = {label: number for number, label in enumerate(dict.fromkeys([*first, *second]))}
    count = len(category)
    joint_UKK = np.zeros((len(first), count, count))
    for unit, (a, b) in enumerate(zip(first, second, strict=True)):
        joint_UKK[unit, category[a], category[b]] = 1

    def kappa(sums_SF: _Floats) -> _Floats:
        joint_SKK = sums_SF.reshape(-1, count, count) / sums_SF.sum(axis=1)[:, None, None]
        observed_S = np.einsum("skk->s", joint_SKK)
        expected_S = (joint_SKK.sum(axis=2) * joint_SKK.sum(axis=1)).sum(axis=1)
        kappa_S: _Floats = (observed_S - expected_S) / (1 - expected_S)
        return kappa_S

    return _bootstrap_over_units(joint_UKK.reshape(len(first), count**2), kappa, seed)


def krippendorff_alpha(
    units: Sequence[Mapping[str, Hashable]], *, seed: int = 0
) -> Estimate | None:
    """Krippendorff's alpha for unordered categories: any number of raters, each of any of the units.

    A unit maps raters to their labels; units with fewer than two labels are
    left out, also of `count`. 1 - D_o / D_e, with D_o the observed and D_e the expected disagreement of
    two labels. Source: Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section C. None where
    no unit has two labels, and where all labels are the same.
    """
    labelled = [list(unit.values()) for unit in units if len(unit) > 1]
    category = {
        label: number for number, label in enumerate(dict.fromkeys(chain.from_iterable(labelled)))
    }
    features_UF = np.zeros((len(labelled), len(category) + 1))
    for unit, labels in enumerate(labelled):
        counts_K = np.bincount([category[label] for label in labels], minlength=len(category))
        size = len(labels)
        features_UF[unit, 0] = (size**2 - (counts_K**2).sum()) / (size - 1)
        features_UF[unit, 1:] = counts_K

    def alpha(sums_SF: _Floats) -> _Floats:
        disagreeing_S, counts_SK = sums_SF[:, 0], sums_SF[:, 1:]
        total_S = counts_SK.sum(axis=1)
        expected_S = (total_S**2 - (counts_SK**2).sum(axis=1)) / (total_S - 1)
        alpha_S: _Floats = 1 - disagreeing_S / expected_S
        return alpha_S

    return _bootstrap_over_units(features_UF, alpha, seed)


def _bootstrap_over_units(
    features_UF: _Floats, statistic: Callable[[_Floats], _Floats], seed: int
) -> Estimate | None:
    """A statistic of the units' summed features, with its bootstrap interval; None where it is not defined."""
    count = len(features_UF)
    if not count:
        return None
    draws_SU = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=_RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(features_UF.sum(axis=0, keepdims=True))[0])
        resampled_S = statistic(draws_SU @ features_UF)
    if not np.isfinite(value):
        return None
    # The statistic is undefined in a resample whose labels are all equal: such resamples are left out.
    defined_S = resampled_S[np.isfinite(resampled_S)]
    low, high = np.quantile(defined_S, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), count)
