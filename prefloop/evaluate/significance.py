"""Significance tests of differences between subjects or methods: by item, by seed, with Holm's correction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import nctdtrinc, stdtr, stdtrit

from prefloop.evaluate.measures import Item
from prefloop.evaluate.stats import Estimate, block_sizes, clustered_mean

_EXACT_CLUSTERS = 12
"""Up to so many clusters the sign-flip test enumerates all sign patterns; above, it draws random ones."""

_RANDOM_PATTERNS = 9_999

_POWER = 0.8
"""How often a difference of size `Contrast.detectable` is called real."""


@dataclass(frozen=True)
class Difference:
    """One metric of two subjects, second minus first."""

    metric: str
    estimate: Estimate
    """Mean over the items that both have, with its 95 % bootstrap interval; clusters are resampled whole."""
    p: float
    """Two-sided p-value of the sign-flip test."""


def differences(first: Iterable[Item], second: Iterable[Item], *, seed: int) -> list[Difference]:
    """Second minus first for each metric, over the items that both have."""
    first_by_key = {(item.group, item.id): item for item in first}
    pairs = [
        (first_by_key[key], other)
        for other in second
        if (key := (other.group, other.id)) in first_by_key
    ]
    metrics = dict.fromkeys(name for item, _ in pairs for name in item.values)
    results = []
    for metric in metrics:
        both = [(a, b) for a, b in pairs if metric in a.values and metric in b.values]
        values = [b.values[metric] - a.values[metric] for a, b in both]
        # An item without a cluster is one by itself; the prefixes keep its name apart from clusters' names.
        clusters = [f"c{a.cluster}" if a.cluster else f"i{a.group}\0{a.id}" for a, _ in both]
        estimate = clustered_mean(values, clusters, seed=seed)
        if estimate is not None:
            results.append(Difference(metric, estimate, sign_flip(values, clusters, seed=seed)))
    return results


def sign_flip(values: Sequence[float], clusters: Sequence[str], *, seed: int) -> float:
    """Two-sided p of "these differences are as likely positive as negative", by flipping signs.

    Source: Fisher (1935), The Design of Experiments, section 21. A cluster's signs are flipped together. All patterns
    up to 12 clusters, else 9,999 drawn ones (Phipson and Smyth 2010: the observed one counts too, so p > 0).
    """
    sums: dict[str, float] = {}
    for value, name in zip(values, clusters, strict=True):
        sums[name] = sums.get(name, 0.0) + value
    sums_N = np.array(list(sums.values()))
    count = len(sums_N)
    # Rounding must not make a pattern equal to the observed one look less extreme.
    bound = abs(float(sums_N.sum())) - 1e-9 * float(np.abs(sums_N).sum())
    if count <= _EXACT_CLUSTERS:
        bits_SN = np.arange(2**count)[:, None] >> np.arange(count) & 1
        return float((np.abs((1 - 2 * bits_SN) @ sums_N) >= bound).mean())
    generator = np.random.default_rng(seed)
    as_extreme = 0
    for size in block_sizes(_RANDOM_PATTERNS, count):
        signs_SN = 1 - 2 * generator.integers(2, size=(size, count))
        as_extreme += int((np.abs(signs_SN @ sums_N) >= bound).sum())
    return (as_extreme + 1) / (_RANDOM_PATTERNS + 1)


Array = NDArray[np.float64]


@dataclass(frozen=True)
class Contrast:
    """The mean difference of two methods."""

    difference: float
    low: float
    high: float
    """Ends of its own 95 % interval, not corrected for multiple comparisons."""
    p: float
    """Two-sided p-value of no difference."""
    detectable: float
    """The true difference that such a comparison would call real (5 %, not corrected) four times in five; 0 without noise."""
    seeds: int
    prompts: int
    """0 where only the seeds' means were available."""


def seed_mean(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """The mean over S seeds with its t-interval (S - 1 degrees of freedom); of one seed, without width: NaN.

    With three seeds it extends 4.3 standard errors to each side.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, float("nan"), float("nan"), count)
    error = float(np.std(values, ddof=1)) / count**0.5
    half = float(stdtrit(count - 1, (1 + level) / 2)) * error
    return Estimate(mean, mean - half, mean + half, count)


def seed_contrast(first: Sequence[float], second: Sequence[float]) -> Contrast | None:
    """First minus second over the same S seeds, paired: the t-test on S differences; None below two seeds."""
    assert len(first) == len(second)
    differences_S = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if len(differences_S) < 2:
        return None
    variance = float(differences_S.var(ddof=1)) / len(differences_S)
    return _contrast(float(differences_S.mean()), variance, len(differences_S) - 1, (len(first), 0))


def crossed_contrast(differences_SP: Array) -> Contrast | None:
    """The mean of S x P differences, one for each seed and prompt; None below two of either.

    Seeds and prompts are both taken as drawn at random, and crossed: every seed met every prompt. The
    variance of the mean is (MS_seeds + MS_prompts - MS_rest) / (S P), its degrees of freedom are
    Satterthwaite's; neither mean square may be below the rest's, which errs on the wide side where a
    variance is small. Source: Searle, Casella and McCulloch (1992), Variance Components, chapter 4;
    Satterthwaite (1946), Biometrics Bulletin 2. In simulations of noise with three seeds it calls 0 to
    8 % of differences real at level 5 %, the most where almost all noise is between seeds.
    """
    seeds, prompts = differences_SP.shape
    if min(seeds, prompts) < 2:
        return None
    mean = float(differences_SP.mean())
    by_seed_S = differences_SP.mean(axis=1) - mean
    by_prompt_P = differences_SP.mean(axis=0) - mean
    rest_SP = differences_SP - mean - by_seed_S[:, None] - by_prompt_P
    df_seed, df_prompt = seeds - 1, prompts - 1
    df_rest = df_seed * df_prompt
    rest = float((rest_SP**2).sum()) / df_rest
    seed = max(prompts * float((by_seed_S**2).sum()) / df_seed, rest)
    prompt = max(seeds * float((by_prompt_P**2).sum()) / df_prompt, rest)
    total = seed + prompt - rest
    spread = seed**2 / df_seed + prompt**2 / df_prompt + rest**2 / df_rest
    freedom = total**2 / spread if spread else float(df_seed)
    return _contrast(mean, total / differences_SP.size, freedom, (seeds, prompts))


def _contrast(mean: float, variance: float, freedom: float, size: tuple[int, int]) -> Contrast:
    error = variance**0.5
    if not error:
        # No variance, hence no t-test: p is that of the sign test over seeds.
        return Contrast(mean, mean, mean, 2 * 0.5 ** size[0] if mean else 1.0, 0.0, *size)
    critical = float(stdtrit(freedom, 0.975))
    half = critical * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error))
    # The noncentral t whose lower fifth ends at the critical value.
    detectable = float(nctdtrinc(freedom, 1 - _POWER, critical)) * error
    return Contrast(mean, mean - half, mean + half, p, detectable, *size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for multiple comparisons: Holm (1979), Scandinavian Journal of Statistics 6."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def not_distinguishable(
    names: Sequence[str], differ: Mapping[frozenset[str], bool]
) -> list[tuple[str, ...]]:
    """The largest sets of names within which no two differ; every name is in at least one.

    Such sets overlap: a may differ from c while b differs from neither. Source: Piepho (2004), J. Comput.
    Graph. Stat. 13 (insert and absorb).
    """
    sets = [frozenset(names)]
    for pair, different in differ.items():
        if not different:
            continue
        split = [group - {name} for group in sets if pair <= group for name in pair]
        sets = [group for group in sets if not pair <= group] + split
        distinct = list(dict.fromkeys(sets))
        sets = [group for group in distinct if not any(group < other for other in distinct)]
    position = {name: index for index, name in enumerate(names)}
    groups = [tuple(sorted(group, key=position.__getitem__)) for group in sets]
    return sorted(groups, key=lambda group: [position[name] for name in group])
