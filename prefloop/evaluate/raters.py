"""How far people who judged the same things agree, beyond what chance would give.

U units (things judged), K categories, S resamples. Both figures are 1 for full agreement, 0 for what chance
gives, and below 0 for less than that. Intervals are percentile bootstraps over units.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from prefloop.evaluate.stats import Estimate

_Floats = NDArray[np.float64]
_RESAMPLES, _LEVEL = 2000, 0.95


def cohen_kappa(
    first: Sequence[Hashable], second: Sequence[Hashable], *, seed: int = 0
) -> Estimate | None:
    """Cohen's kappa of two raters who each put the same U units into one of K unordered categories.

    (p_o - p_e) / (1 - p_e), with p_o the share of units on which they agree and p_e what it would be if
    each rater's labels were shuffled. Source: Cohen (1960), Educ. Psychol. Meas. 20(1). None without units, and
    where both used one and the same category only, since then nothing can be told from chance.
    """
    assert len(first) == len(second)
    place = {label: number for number, label in enumerate(dict.fromkeys([*first, *second]))}
    count = len(place)
    joint_UKK = np.zeros((len(first), count, count))
    for unit, (a, b) in enumerate(zip(first, second, strict=True)):
        joint_UKK[unit, place[a], place[b]] = 1

    def kappa(sums_SF: _Floats) -> _Floats:
        joint_SKK = sums_SF.reshape(-1, count, count) / sums_SF.sum(axis=1)[:, None, None]
        observed_S = np.einsum("skk->s", joint_SKK)
        expected_S = (joint_SKK.sum(axis=2) * joint_SKK.sum(axis=1)).sum(axis=1)
        kappa_S: _Floats = (observed_S - expected_S) / (1 - expected_S)
        return kappa_S

    return _over_units(joint_UKK.reshape(len(first), count**2), kappa, seed)


def krippendorff_alpha(
    units: Sequence[Mapping[str, Hashable]], *, seed: int = 0
) -> Estimate | None:
    """Krippendorff's alpha for unordered categories: any number of raters, each of any of the units.

    A unit maps raters to their labels; units with fewer than two labels tell nothing about agreement and
    are left out, also of `count`. 1 - D_o / D_e, with D_o the observed and D_e the expected disagreement of
    two labels. Source: Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section C. None where
    no unit has two labels, and where all labels are the same.
    """
    labelled = [list(unit.values()) for unit in units if len(unit) > 1]
    place = {
        label: number for number, label in enumerate(dict.fromkeys(chain.from_iterable(labelled)))
    }
    features_UF = np.zeros((len(labelled), len(place) + 1))
    for unit, labels in enumerate(labelled):
        counts_K = np.bincount([place[label] for label in labels], minlength=len(place))
        size = len(labels)
        features_UF[unit, 0] = (size**2 - (counts_K**2).sum()) / (size - 1)
        features_UF[unit, 1:] = counts_K

    def alpha(sums_SF: _Floats) -> _Floats:
        disagreeing_S, counts_SK = sums_SF[:, 0], sums_SF[:, 1:]
        total_S = counts_SK.sum(axis=1)
        expected_S = (total_S**2 - (counts_SK**2).sum(axis=1)) / (total_S - 1)
        alpha_S: _Floats = 1 - disagreeing_S / expected_S
        return alpha_S

    return _over_units(features_UF, alpha, seed)


def _over_units(
    features_UF: _Floats, figure: Callable[[_Floats], _Floats], seed: int
) -> Estimate | None:
    """A figure of the units' summed features, and its interval; None where the figure is not defined."""
    count = len(features_UF)
    if not count:
        return None
    draws_SU = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=_RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(figure(features_UF.sum(axis=0, keepdims=True))[0])
        resampled_S = figure(draws_SU @ features_UF)
    if not np.isfinite(value):
        return None
    # A resample in which everybody says the same has no figure; the others stand for it.
    defined_S = resampled_S[np.isfinite(resampled_S)]
    low, high = np.quantile(defined_S, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), count)
