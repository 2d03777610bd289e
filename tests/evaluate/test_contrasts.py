"""Contrasts: values by hand, identities, and how often noise is called a difference."""

import math

import numpy as np
import pytest
from scipy import stats

from prefloop.evaluate.significance import (
    crossed_contrast,
    holm,
    not_distinguishable,
    seed_contrast,
    seed_mean,
)


def test_the_mean_over_three_seeds_has_the_t_interval_of_the_books():
    found = seed_mean([1.0, 2.0, 3.0])
    # t(0.975; 2) = 4.3027; the standard error is 1 / sqrt(3).
    assert found.value == 2.0
    assert found.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.count == 3


def test_one_seed_has_a_mean_and_no_interval():
    found = seed_mean([1.0])
    assert found.value == 1.0
    assert math.isnan(found.low)
    assert seed_contrast([1.0], [0.0]) is None


def test_the_seed_contrast_is_the_paired_t_test():
    first, second = [3.1, 2.7, 3.9, 3.3], [2.0, 2.2, 3.5, 2.1]
    found = seed_contrast(first, second)
    other = stats.ttest_rel(first, second)
    assert found is not None
    assert found.p == pytest.approx(other.pvalue)
    interval = other.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_without_any_variation_the_signs_decide():
    same = seed_contrast([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    shifted = seed_contrast([1.5, 1.5, 1.5], [1.0, 1.0, 1.0])
    assert same is not None
    assert same.p == 1.0
    assert shifted is not None
    assert shifted.p == 0.25
    assert shifted.detectable == 0.0


def test_the_crossed_contrast_by_hand():
    # Seeds 1, 3; prompts 0, 2, 4 around a mean of 2; no rest: MS_seed = 3*(1+1)/1 = 6, MS_prompt = 2*8/2 = 8.
    found = crossed_contrast(np.array([[-1.0, 1.0, 3.0], [1.0, 3.0, 5.0]]))
    assert found is not None
    assert found.difference == 2.0
    variance = (6 + 8 - 0) / 6
    freedom = 14**2 / (6**2 / 1 + 8**2 / 2)
    assert found.p == pytest.approx(2 * stats.t.sf(2 / math.sqrt(variance), freedom))
    assert found.high - 2 == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(variance))


def drawn(
    generator: np.random.Generator, shape: tuple[int, int], seed: float, prompt: float, rest: float
) -> np.ndarray:
    """Differences without a true one, with these standard deviations between seeds, prompts, and the rest."""
    seeds, prompts = shape
    return (
        seed * generator.normal(size=(seeds, 1))
        + prompt * generator.normal(size=(1, prompts))
        + rest * generator.normal(size=shape)
    )


@pytest.mark.parametrize(
    ("seed", "prompt"), [(0.0, 0.0), (0.0, 1.0), (0.3, 1.0), (1.0, 1.0), (1.0, 0.0)]
)
@pytest.mark.parametrize("shape", [(3, 12), (3, 48), (5, 16)])
def test_noise_is_called_a_difference_at_no_more_than_the_stated_rate(shape, seed, prompt):
    generator = np.random.default_rng(5)
    trials = 1000
    wrong = 0
    for _ in range(trials):
        found = crossed_contrast(drawn(generator, shape, seed, prompt, 1.0))
        assert found is not None
        wrong += found.p < 0.05
    # 8 %, and three standard errors of the count.
    assert wrong / trials < 0.08 + 3 * math.sqrt(0.08 * 0.92 / trials)


def test_looking_at_prompts_alone_would_call_the_luck_of_seeds_a_difference():
    """What the crossed contrast is for: the same noise, tested as if seeds did not matter."""
    generator = np.random.default_rng(5)
    naive = [
        stats.ttest_1samp(drawn(generator, (3, 48), 1.0, 1.0, 1.0).mean(axis=0), 0.0).pvalue
        for _ in range(300)
    ]
    assert np.mean(np.array(naive) < 0.05) > 0.4


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_difference_of_the_detectable_size_is_found_four_times_in_five(seeds):
    generator = np.random.default_rng(8)
    noise = [generator.normal(size=seeds) for _ in range(4000)]
    plain = seed_contrast(list(noise[0]), [0.0] * seeds)
    assert plain is not None
    size = plain.detectable / float(noise[0].std(ddof=1))  # in standard deviations of a difference
    found = [seed_contrast(list(size + one), [0.0] * seeds) for one in noise]
    assert np.mean([one.p < 0.05 for one in found if one]) == pytest.approx(0.8, abs=0.02)


def test_a_large_difference_is_found():
    generator = np.random.default_rng(6)
    found = [crossed_contrast(1.5 + drawn(generator, (3, 16), 0.1, 0.5, 1.0)) for _ in range(200)]
    assert sum(one.p < 0.05 for one in found if one) > 180


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_all_pairs_of_five_equal_methods_are_called_noise_together():
    """Familywise: no true difference among five variants, ten pairs, Holm."""
    generator = np.random.default_rng(7)
    wrong = 0
    for _ in range(200):
        scores = [drawn(generator, (3, 16), 0.3, 1.0, 1.0) for _ in range(5)]
        pairs = [(a, b) for a in range(5) for b in range(a)]
        found = [crossed_contrast(scores[a] - scores[b]) for a, b in pairs]
        wrong += min(holm([one.p for one in found if one])) < 0.05
    assert wrong / 200 < 0.1


def test_groups_are_the_largest_sets_that_hold_no_difference():
    def groups(names: str, *differ: str) -> list[str]:
        pairs = {frozenset(a + b): False for n, a in enumerate(names) for b in names[:n]}
        found = not_distinguishable(list(names), {**pairs, **{frozenset(d): True for d in differ}})
        return ["".join(group) for group in found]

    assert groups("abc") == ["abc"]
    assert groups("abc", "ac") == ["ab", "bc"]
    assert groups("abc", "ac", "bc") == ["ab", "c"]
    assert groups("abc", "ab", "ac", "bc") == ["a", "b", "c"]
    assert groups("abcd", "ad", "bd") == ["abc", "cd"]
    assert groups("a") == ["a"]
