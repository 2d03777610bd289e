"""Intervals against published and closed-form values."""

import numpy as np
import pytest

from prefloop.evaluate.stats import bootstrap_mean, clustered_mean, ratio, wilson


def test_wilson_matches_newcombe_1998_table_1():
    # Newcombe (1998), Statistics in Medicine 17, Table I, method 3.
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    found = wilson(0, 20)
    assert (found.low, round(found.high, 4)) == (0.0, 0.1611)
    found = wilson(1, 29)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0061, 0.1718)


@pytest.mark.parametrize("count", [1, 3, 7, 29, 1000])
def test_wilson_is_mirrored_and_holds_its_share(count):
    for successes in {0, count // 2, count}:
        found, mirror = wilson(successes, count), wilson(count - successes, count)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.low == pytest.approx(1 - mirror.high, abs=1e-12)
        assert found.high > found.low


def test_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=4000)
    found = bootstrap_mean(values, seed=1)
    half = 1.96 * values.std() / 4000**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.value - found.low == pytest.approx(half, rel=0.08)
    assert found.high - found.value == pytest.approx(half, rel=0.08)


def test_bootstrap_is_the_same_for_one_seed_and_another_for_another():
    values = [0.1, 0.9, 0.4, 0.7, 0.2, 0.35]
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)


def test_bootstrap_of_constant_values_has_no_width():
    found = bootstrap_mean([2.0, 2.0, 2.0], seed=0)
    assert (found.value, found.low, found.high, found.count) == (2.0, 2.0, 2.0, 3)


def test_resampling_in_blocks_uses_every_resample(monkeypatch):
    whole = bootstrap_mean(range(50), seed=3, resamples=501)
    monkeypatch.setattr("prefloop.evaluate.stats._BLOCK", 200)
    assert bootstrap_mean(range(50), seed=3, resamples=501) == whole


def test_estimates_of_nothing_are_none():
    assert bootstrap_mean([], seed=0) is None
    assert wilson(0, 0) is None


# Coverage: how often an interval that says 95 % holds the truth.

TRIALS = 400
# Three standard errors of a share of 95 % over so many trials.
SLACK = 3 * (0.95 * 0.05 / TRIALS) ** 0.5


def share_held(truth, estimate):
    """How often the interval of a trial's estimate holds the truth."""
    found = [estimate(trial) for trial in range(TRIALS)]
    return sum(one.low <= truth <= one.high for one in found) / TRIALS


def test_bootstrap_covers_a_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)

    def estimate(trial):
        return bootstrap_mean(generator.gamma(2.0, size=100), seed=trial, resamples=500)

    # A percentile interval of skewed values is a little too narrow.
    assert share_held(2.0, estimate) == pytest.approx(0.95, abs=SLACK + 0.01)


def test_bootstrap_covers_a_win_rate_with_ties_as_often_as_it_says():
    generator = np.random.default_rng(1)

    def estimate(trial):
        points = generator.choice([0.0, 0.5, 1.0], p=[0.3, 0.2, 0.5], size=80)
        return bootstrap_mean(points, seed=trial, resamples=500)

    assert share_held(0.6, estimate) == pytest.approx(0.95, abs=SLACK + 0.01)


def test_resampling_clusters_covers_where_resampling_values_does_not():
    generator = np.random.default_rng(3)
    clusters = [str(n // 5) for n in range(200)]
    held = alone = 0
    for trial in range(TRIALS // 2):
        values = np.repeat(generator.normal(1.0, 1.0, size=40), 5) + generator.normal(size=200) / 5
        found = clustered_mean(values.tolist(), clusters, seed=trial, resamples=500)
        held += found.low <= 1.0 <= found.high
        naive = bootstrap_mean(values, seed=trial, resamples=500)
        alone += naive.low <= 1.0 <= naive.high
    assert held / (TRIALS // 2) > 0.88
    assert alone / (TRIALS // 2) < 0.75


def test_one_value_has_an_interval_without_width():
    for found in (bootstrap_mean([0.5], seed=0), clustered_mean([0.5], ["a"], seed=0)):
        assert (found.value, found.low, found.high, found.count) == (0.5, 0.5, 0.5, 1)


def test_a_ratio_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)

    def estimate(trial):
        sizes = generator.integers(1, 40, size=60).astype(float)
        sums = sizes * 0.3 + generator.normal(size=60) * np.sqrt(sizes)
        return ratio(sums.tolist(), sizes.tolist(), seed=trial, resamples=500)

    assert share_held(0.3, estimate) == pytest.approx(0.95, abs=SLACK + 0.02)
    assert ratio([0.0], [0.0], seed=0) is None
