"""Intervals of a task's mean, of the mean over tasks, and of what two models differ by.

A task may consist of strata (MMLU's subjects) that count alike however many questions each has. The mean over
tasks is then a mean of means, and its interval follows from theirs: the questions of all tasks in one pot would
give the largest task the most weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from prefloop.evaluate.stats import Estimate, wilson, wilson_share

Strata = Mapping[str, Sequence[float]]
"""Values by stratum; a task without strata is one of them."""

# From so many values or strata on, their variance is known well enough to be relied on.
_ENOUGH = 10


def share_of_strata(strata: Strata) -> Estimate:
    """The mean of the strata's shares of 1 among their zeros and ones, with a Wilson interval at 95 %."""
    values = [value for part in strata.values() for value in part]
    share, count = _mean(strata), len(values)
    if len(strata) == 1:
        found = wilson(round(sum(values)), count)
        assert found is not None
        return found
    spread = _variance_of_mean(strata)
    size = share * (1 - share) / spread if spread else count
    return wilson_share(share, size or count, count=count)


def mean_of(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, with an interval as lopsided as theirs.

    Source: Zou and Donner (2008), Statistics in Medicine 27: the variance is recovered from each
    part's own limits, the lower from the lower ones and the upper from the upper ones.
    """
    value = sum(part.value for part in parts) / len(parts)
    below = sum((part.value - part.low) ** 2 for part in parts) ** 0.5 / len(parts)
    above = sum((part.high - part.value) ** 2 for part in parts) ** 0.5 / len(parts)
    return Estimate(value, value - below, value + above, sum(part.count for part in parts))


def mean_difference(strata: Strata, *, level: float = 0.95) -> Estimate:
    """The mean of the strata's mean differences, each in [-1, 1] and of one question answered twice.

    A normal interval, never narrower than if each side had won one question more: else two models that agree on
    the few questions asked would pass for equal. Source of that: Bonett and Price (2012), Journal of
    Educational and Behavioral Statistics 37, who add those questions.
    """
    count = sum(map(len, strata.values()))
    value = _mean(strata)
    least = 2 / (count + 2) ** 2
    half = NormalDist().inv_cdf((1 + level) / 2) * max(_variance_of_mean(strata), least) ** 0.5
    return Estimate(value, max(-1.0, value - half), min(1.0, value + half), count)


def _mean(strata: Strata) -> float:
    return float(np.mean([np.mean(part) for part in strata.values()]))


def _variance_of_mean(strata: Strata) -> float:
    """Within the strata where each has enough values; else between them, which is wider, if they are enough."""
    parts = list(strata.values())
    if all(len(part) >= _ENOUGH for part in parts) or len(parts) == 1:
        return sum(_variance(part) / len(part) for part in parts) / len(parts) ** 2
    if len(parts) >= _ENOUGH:
        return _variance([float(np.mean(part)) for part in parts]) / len(parts)
    values = [value for part in parts for value in part]
    return _variance(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    """Unbiased; 0 of a single value."""
    return float(np.var(values, ddof=1)) if len(values) > 1 else 0.0
