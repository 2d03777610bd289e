"""A share over two crossed families, such as attacks and prompts, with an interval that respects both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import NormalDist

from scipy.special import stdtrit

from prefloop.evaluate.stats import Estimate, wilson_share


def crossed_share(
    hits: Sequence[bool], first: Sequence[str], second: Sequence[str], *, level: float = 0.95
) -> Estimate | None:
    """The share of N hits, each of one attack (`first`) on one prompt (`second`); None where N = 0.

    An attack that works, works on many prompts, and a prompt that gives way does so to many attacks, so
    N trials say less than N independent ones. The variance is the two-way clustered one (Cameron, Gelbach
    and Miller 2011, J. Bus. Econ. Stat. 29, equation 2.3, with the factor G/(G - 1)); it gives an
    effective number of trials (Kish 1965), reduced for few clusters by Student's t (Korn and Graubard
    1998), and Wilson's interval takes that number. So it has a width at 0 and at 1, where a bootstrap has
    none; where all trials agree, the smaller number of clusters is the effective one. A family with one
    member counts as fixed: the interval is then about that attack, or that prompt, alone.
    """
    assert len(hits) == len(first) == len(second)
    if not hits:
        return None
    count, share = len(hits), sum(hits) / len(hits)
    sizes = (len(set(first)), len(set(second)))
    clusters = min((size for size in sizes if size > 1), default=1)
    effective = _effective(hits, first, second, share, clusters)
    z, t = NormalDist().inv_cdf((1 + level) / 2), stdtrit(max(1, clusters - 1), (1 + level) / 2)
    return wilson_share(share, effective * float(z / t) ** 2, count=count, level=level)


def _effective(
    hits: Sequence[bool], first: Sequence[str], second: Sequence[str], share: float, clusters: int
) -> float:
    """How many independent trials would have the variance of these."""
    rows, columns = _squares(hits, first, share), _squares(hits, second, share)
    variance = max(rows + columns - share * (1 - share) / len(hits), rows, columns)
    if variance <= 0:
        return clusters
    return min(len(hits), share * (1 - share) / variance)


def _squares(hits: Sequence[bool], names: Sequence[str], share: float) -> float:
    """Variance of the share with one family's clusters as the independent units."""
    sums: defaultdict[str, float] = defaultdict(float)
    for hit, name in zip(hits, names, strict=True):
        sums[name] += hit - share
    correction = len(sums) / (len(sums) - 1) if len(sums) > 1 else 1.0
    return correction * sum(value**2 for value in sums.values()) / len(hits) ** 2
