"""Estimates with their intervals: bootstrap for means, Wilson for proportions. N values, S resamples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

# Numbers of resamples held at a time: 8 MB, however many values there are.
_BLOCK = 2**20


@dataclass(frozen=True)
class Estimate:
    """A mean or proportion, its interval, and the number of values behind it."""

    value: float
    low: float
    high: float
    count: int


def block_sizes(resamples: int, count: int) -> Iterator[int]:
    """How many resamples of `count` values to draw at a time, until there are all."""
    rows = max(1, _BLOCK // count)
    for start in range(0, resamples, rows):
        yield min(rows, resamples - start)


def bootstrap_mean(
    values: Sequence[float], *, seed: int, level: float = 0.95, resamples: int = 2000
) -> Estimate | None:
    """The mean of N values and its percentile bootstrap interval; None where there are no values.

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 13.3. Equal values
    and seed give equal intervals. With fewer than about ten values the interval is too narrow.
    """
    values_N = np.asarray(values, dtype=np.float64)
    count = len(values_N)
    if not count:
        return None
    generator = np.random.default_rng(seed)
    blocks = [
        values_N[generator.integers(count, size=(size, count))].mean(axis=1)
        for size in block_sizes(resamples, count)
    ]
    means_S = np.concatenate(blocks)
    low, high = np.quantile(means_S, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values_N.mean()), float(low), float(high), count)


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence[str],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> Estimate | None:
    """The mean of N values whose interval resamples whole clusters; None where there are no values.

    For values that are not independent, such as several pairs of answers to one prompt: resampling the
    values alone would make the interval too narrow. Source: Davison and Hinkley (1997), Bootstrap Methods
    and their Application, section 3.8. With fewer than about ten clusters it is too narrow all the same.
    """
    assert len(values) == len(clusters)
    if not values:
        return None
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    sums_N, sizes_N = np.zeros(len(names)), np.zeros(len(names))
    for value, name in zip(values, clusters, strict=True):
        sums_N[names[name]] += value
        sizes_N[names[name]] += 1
    estimate = ratio(sums_N, sizes_N, seed=seed, level=level, resamples=resamples)
    assert estimate is not None
    return replace(estimate, count=len(values))


def ratio(
    sums: Sequence[float] | NDArray[np.float64],
    sizes: Sequence[float] | NDArray[np.float64],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> Estimate | None:
    """sum(sums) / sum(sizes) of N units, with a percentile bootstrap interval over units; None where all sizes are 0.

    A mean over parts of units, such as nats per token over answers; long units weigh more.
    """
    sums_N, sizes_N = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    count = len(sums_N)
    if not sizes_N.sum():
        return None
    generator = np.random.default_rng(seed)
    means = []
    for size in block_sizes(resamples, count):
        drawn = generator.integers(count, size=(size, count))
        sizes_S = sizes_N[drawn].sum(axis=1)
        means.append(sums_N[drawn].sum(axis=1)[sizes_S > 0] / sizes_S[sizes_S > 0])
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    mean = float(sums_N.sum() / sizes_N.sum())
    return Estimate(mean, min(float(low), mean), max(float(high), mean), count)


def wilson(successes: int, count: int, *, level: float = 0.95) -> Estimate | None:
    """A proportion and its Wilson score interval; None where `count` is 0.

    Source: Wilson (1927), J. Am. Stat. Assoc. 22. Never leaves [0, 1], and at 0 or `count` successes
    still has a width, which is why proportions such as JSR use it and not the bootstrap.
    """
    assert 0 <= successes <= count, f"{successes} of {count}"
    if not count:
        return None
    return wilson_proportion(successes / count, count, count=count, level=level)


def wilson_proportion(
    proportion: float, size: float, *, count: int, level: float = 0.95
) -> Estimate:
    """The Wilson interval of a proportion that is as certain as one of `size` independent values.

    `size` need not be whole: where `count` values are not independent or not equally likely drawn, it is
    the effective size, p·(1 − p)/variance. Source: Franco et al. (2019), Comparative Study of
    Confidence Intervals for Proportions in Complex Sample Surveys.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z**2 / size
    centre = (proportion + z**2 / (2 * size)) / scale
    half = z / scale * (proportion * (1 - proportion) / size + z**2 / (4 * size**2)) ** 0.5
    # Rounding must not put the interval's end past the proportion itself at 0 and 1.
    return Estimate(
        proportion,
        min(max(0.0, centre - half), proportion),
        max(min(1.0, centre + half), proportion),
        count,
    )


def crossed_proportion(
    hits: Sequence[bool], first: Sequence[str], second: Sequence[str], *, level: float = 0.95
) -> Estimate | None:
    """The proportion of hits among N trials of an attack (`first`) on a prompt (`second`); None where N = 0.

    A strong attack succeeds on many prompts, and a weak prompt yields to many attacks, so N trials say
    less than N independent ones. The variance is the two-way clustered one (Cameron, Gelbach
    and Miller 2011, J. Bus. Econ. Stat. 29, equation 2.3, with the factor G/(G - 1)); it gives an
    effective number of trials (Kish 1965), reduced for few clusters by Student's t (Korn and Graubard
    1998), and Wilson's interval takes that number. So it has a width at 0 and at 1, where a bootstrap has
    none; where all trials agree, the smaller number of clusters is the effective one. A family with one
    member counts as fixed: the interval is then about that attack, or that prompt, alone.
    """
    assert len(hits) == len(first) == len(second)
    if not hits:
        return None
    count, proportion = len(hits), sum(hits) / len(hits)
    sizes = (len(set(first)), len(set(second)))
    clusters = min((size for size in sizes if size > 1), default=1)
    effective = _effective_size(hits, first, second, proportion, clusters)
    # With numbers only: runs, and tables of them, begin without waiting for scipy.
    from scipy.special import stdtrit

    z, t = NormalDist().inv_cdf((1 + level) / 2), stdtrit(max(1, clusters - 1), (1 + level) / 2)
    return wilson_proportion(proportion, effective * float(z / t) ** 2, count=count, level=level)


def _effective_size(
    hits: Sequence[bool],
    first: Sequence[str],
    second: Sequence[str],
    proportion: float,
    clusters: int,
) -> float:
    """The number of independent trials whose proportion would have the same variance."""
    rows, columns = (
        _clustered_variance(hits, first, proportion),
        _clustered_variance(hits, second, proportion),
    )
    variance = max(rows + columns - proportion * (1 - proportion) / len(hits), rows, columns)
    if variance <= 0:
        return clusters
    return min(len(hits), proportion * (1 - proportion) / variance)


def _clustered_variance(hits: Sequence[bool], names: Sequence[str], proportion: float) -> float:
    """Variance of the proportion where trials of one name (attack or prompt) form one independent cluster."""
    sums: defaultdict[str, float] = defaultdict(float)
    for hit, name in zip(hits, names, strict=True):
        sums[name] += hit - proportion
    correction = len(sums) / (len(sums) - 1) if len(sums) > 1 else 1.0
    return correction * sum(value**2 for value in sums.values()) / len(hits) ** 2


Strata = Mapping[str, Sequence[float]]
"""Values by stratum; a task without strata is one of them."""

# With fewer values or strata than this, their sample variance is not relied on.
_ENOUGH_FOR_VARIANCE = 10


def stratified_proportion(strata: Strata) -> Estimate:
    """The mean over strata of the proportion of ones among zeros and ones, with a 95 % Wilson interval."""
    values = [value for part in strata.values() for value in part]
    proportion, count = _mean(strata), len(values)
    if len(strata) == 1:
        estimate = wilson(round(sum(values)), count)
        assert estimate is not None
        return estimate
    spread = _variance_of_mean(strata)
    size = proportion * (1 - proportion) / spread if spread else count
    return wilson_proportion(proportion, size or count, count=count)


def mean_of(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, with an interval as asymmetric as theirs.

    Source: Zou and Donner (2008), Statistics in Medicine 27: the variance is recovered from each
    part's own limits, the lower from the lower ones and the upper from the upper ones.
    """
    value = sum(part.value for part in parts) / len(parts)
    below = sum((part.value - part.low) ** 2 for part in parts) ** 0.5 / len(parts)
    above = sum((part.high - part.value) ** 2 for part in parts) ** 0.5 / len(parts)
    return Estimate(value, value - below, value + above, sum(part.count for part in parts))


def _mean(strata: Strata) -> float:
    return float(np.mean([np.mean(part) for part in strata.values()]))


def _variance_of_mean(strata: Strata) -> float:
    """From the variance within strata where each has enough values; else from that between strata, which is wider."""
    parts = list(strata.values())
    if all(len(part) >= _ENOUGH_FOR_VARIANCE for part in parts) or len(parts) == 1:
        return sum(_variance(part) / len(part) for part in parts) / len(parts) ** 2
    if len(parts) >= _ENOUGH_FOR_VARIANCE:
        return _variance([float(np.mean(part)) for part in parts]) / len(parts)
    values = [value for part in parts for value in part]
    return _variance(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    """The unbiased sample variance; 0 for a single value."""
    return float(np.var(values, ddof=1)) if len(values) > 1 else 0.0
