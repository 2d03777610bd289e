"""Two subjects on the same items: paired differences, and how often chance alone would make them.

Shapes: N clusters of items, S sign patterns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from prefloop.evaluate.measures import Item
from prefloop.evaluate.stats import Estimate, clustered_mean, in_blocks

_EXACT = 12
"""Clusters up to which all sign patterns are gone through."""
_PATTERNS = 9_999


@dataclass(frozen=True)
class Difference:
    """One metric of two subjects, second minus first."""

    metric: str
    estimate: Estimate
    """Mean over the items that both have, with its 95 % bootstrap interval; clusters are resampled whole."""
    p: float
    """Of the sign-flip test, two-sided: how often chance alone differs so much."""


def differences(first: Iterable[Item], second: Iterable[Item], *, seed: int) -> list[Difference]:
    """Second minus first for every metric that any item of both has, in the first's order."""
    mine = {(item.group, item.id): item for item in first}
    pairs = [(mine[key], other) for other in second if (key := (other.group, other.id)) in mine]
    metrics = dict.fromkeys(name for item, _ in pairs for name in item.values)
    found = []
    for metric in metrics:
        both = [(a, b) for a, b in pairs if metric in a.values and metric in b.values]
        values = [b.values[metric] - a.values[metric] for a, b in both]
        # An item that stands alone is a cluster of its own, whatever others are called.
        clusters = [f"c{a.cluster}" if a.cluster else f"i{a.group}\0{a.id}" for a, _ in both]
        estimate = clustered_mean(values, clusters, seed=seed)
        if estimate is not None:
            found.append(Difference(metric, estimate, sign_flip(values, clusters, seed=seed)))
    return found


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
    # Rounding must not make a pattern that equals the observed one fall short of it.
    bound = abs(float(sums_N.sum())) - 1e-9 * float(np.abs(sums_N).sum())
    if count <= _EXACT:
        bits_SN = np.arange(2**count)[:, None] >> np.arange(count) & 1
        return float((np.abs((1 - 2 * bits_SN) @ sums_N) >= bound).mean())
    generator = np.random.default_rng(seed)
    as_far = 0
    for size in in_blocks(_PATTERNS, count):
        signs_SN = 1 - 2 * generator.integers(2, size=(size, count))
        as_far += int((np.abs(signs_SN @ sums_N) >= bound).sum())
    return (as_far + 1) / (_PATTERNS + 1)
