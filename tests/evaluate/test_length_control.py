"""The length-controlled win rate recovers what was planted, and is defined where a logistic fit is not."""

from __future__ import annotations

import numpy as np
import pytest

from prefloop.evaluate.win_rates import length_controlled


def simulated(
    rate: float, leaning: float, count: int, seed: int, mean_difference: float = 80.0
) -> tuple[list[float], list[float]]:
    """Wins of an answer that at equal lengths wins with `rate`, by a judge that leans towards length."""
    generator = np.random.default_rng(seed)
    lengths = generator.normal(mean_difference, 100.0, size=count)
    log_odds = np.log(rate / (1 - rate)) + leaning * np.tanh(lengths / lengths.std())
    points = (generator.random(count) < 1 / (1 + np.exp(-log_odds))).astype(float)
    return points.tolist(), lengths.tolist()


@pytest.mark.parametrize("rate", [0.35, 0.5, 0.65])
def test_a_planted_rate_is_recovered_where_length_blows_it_up(rate: float) -> None:
    points, lengths = simulated(rate, leaning=2.0, count=4000, seed=1)
    found = length_controlled(points, lengths, seed=0, resamples=200)
    assert found is not None
    assert np.mean(points) > rate + 0.1, "the plain rate is misled"
    assert found.value == pytest.approx(rate, abs=0.035)
    assert found.low < rate < found.high


def test_a_judge_that_sees_no_length_gives_the_plain_rate() -> None:
    points, lengths = simulated(0.6, leaning=0.0, count=3000, seed=2)
    found = length_controlled(points, lengths, seed=0, resamples=50)
    assert found is not None
    assert found.value == pytest.approx(np.mean(points), abs=0.03)


def test_the_interval_covers_the_planted_rate_about_as_often_as_it_says() -> None:
    held = 0
    for trial in range(100):
        points, lengths = simulated(0.55, leaning=1.0, count=150, seed=trial)
        found = length_controlled(points, lengths, seed=trial, resamples=120)
        assert found is not None
        held += found.low <= 0.55 <= found.high
    # 95 % of 100, less three standard errors, and less what the prior on the leaning costs.
    assert 0.86 <= held / 100 <= 1.0


def test_the_fit_is_at_the_likelihoods_peak() -> None:
    points, lengths = simulated(0.6, leaning=1.0, count=120, seed=3)
    found = length_controlled(points, lengths, seed=0, resamples=10)
    assert found is not None
    z = np.tanh(np.array(lengths) / np.std(lengths))
    y = np.array(points)

    def likelihood(a: float, b: float) -> float:
        s = a + b * z
        return float((y * s - np.logaddexp(0, s)).sum() - b * b / 2)

    a = np.log(found.value / (1 - found.value))
    best = max(likelihood(a, b) for b in np.linspace(-5, 5, 2001))
    for other in (a - 0.05, a + 0.05):
        assert max(likelihood(other, b) for b in np.linspace(-5, 5, 2001)) < best


def test_wins_that_go_with_length_alone_are_a_draw_at_equal_lengths() -> None:
    lengths = [10.0, 25.0, 40.0, -10.0, -25.0, -40.0] * 5
    found = length_controlled([float(d > 0) for d in lengths], lengths, seed=0)
    assert found is not None
    assert found.value == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("point", [0.0, 0.5, 1.0])
def test_equal_outcomes_are_what_they_are(point: float) -> None:
    for lengths in ([3.0] * 8, [0.0] * 8, list(range(-4, 4))):
        found = length_controlled([point] * 8, lengths, seed=0)
        assert found is not None
        assert found.value == pytest.approx(point, abs=1e-5)
        assert found.high - found.low < 1e-5
        assert np.isfinite([found.low, found.high]).all()


def test_one_prompt_and_none() -> None:
    found = length_controlled([1.0], [12.0], seed=0)
    assert found is not None
    assert found.count == 1
    assert found.value == pytest.approx(1.0, abs=1e-5)
    assert length_controlled([], [], seed=0) is None


def test_lengths_that_never_differ_leave_the_plain_rate() -> None:
    found = length_controlled([1.0, 0.0, 1.0, 0.5], [0.0] * 4, seed=0)
    assert found is not None
    assert found.value == pytest.approx(0.625)


def test_the_same_seed_gives_the_same_interval() -> None:
    points, lengths = simulated(0.6, leaning=1.0, count=50, seed=4)
    assert length_controlled(points, lengths, seed=1) == length_controlled(points, lengths, seed=1)
    assert length_controlled(points, lengths, seed=1) != length_controlled(points, lengths, seed=2)
