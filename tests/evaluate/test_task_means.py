"""Intervals of means over tasks: values by hand, and coverage in simulations."""

from __future__ import annotations

import numpy as np
import pytest

from prefloop.evaluate.stats import (
    Estimate,
    bootstrap_mean,
    mean_of,
    stratified_proportion,
    wilson,
)


def test_one_stratum_is_wilsons_interval() -> None:
    assert stratified_proportion({"": [1.0, 0.0, 0.0, 1.0, 1.0]}) == wilson(3, 5)


def test_strata_count_alike_whatever_their_size() -> None:
    strata = {"large": [1.0] * 90 + [0.0] * 10, "small": [1.0] * 2 + [0.0] * 8}
    found = stratified_proportion(strata)
    assert (found.value, found.count) == (pytest.approx(0.55), 110)
    # (0.09/99 + 0.16/9)/4 = 0.0046717 is the variance of the mean: 0.55·0.45/0.0046717 = 52.98 values' worth.
    half = (wilson(53, 106).high - wilson(53, 106).low) / 2  # type: ignore[union-attr]
    assert (found.high - found.low) / 2 == pytest.approx(half * (106 / 52.98) ** 0.5, rel=0.03)


def test_nothing_right_and_everything_right_still_have_a_width() -> None:
    for value, side in ((0.0, "high"), (1.0, "low")):
        found = stratified_proportion({str(n): [value] for n in range(12)})
        assert found.value == value
        assert abs(getattr(found, side) - value) > 0.1
        assert mean_of([found, found]).value == value


def test_the_limits_of_a_mean_come_from_the_limits_of_its_parts() -> None:
    parts = [Estimate(0.2, 0.1, 0.4, 10), Estimate(0.6, 0.3, 0.8, 20)]
    found = mean_of(parts)
    assert found.value == pytest.approx(0.4)
    assert found.low == pytest.approx(0.4 - (0.1**2 + 0.3**2) ** 0.5 / 2)
    assert found.high == pytest.approx(0.4 + (0.2**2 + 0.2**2) ** 0.5 / 2)
    assert found.count == 30


def drawn(rng: np.random.Generator, share: float, count: int) -> list[float]:
    return (rng.random(count) < share).astype(float).tolist()


@pytest.mark.parametrize("subject_items", [1, 2, 12])
def test_the_interval_of_the_mean_over_tasks_covers_the_truth(subject_items: int) -> None:
    """Four tasks of shares, one of graded values, one of 57 subjects; one task is nearly hopeless."""
    rng = np.random.default_rng(7)
    shares, subjects = (0.55, 0.3, 0.5, 0.02), rng.uniform(0.2, 0.7, 57)
    truth = (sum(shares) + 0.4 + subjects.mean()) / 6
    hits, trials = 0, 300
    for trial in range(trials):
        graded = bootstrap_mean(rng.beta(2, 3, 40).tolist(), seed=trial, resamples=300)
        assert graded is not None
        by_subject = {str(n): drawn(rng, p, subject_items) for n, p in enumerate(subjects)}
        parts = [stratified_proportion({"": drawn(rng, share, 40)}) for share in shares]
        found = mean_of([*parts, graded, stratified_proportion(by_subject)])
        hits += found.low <= truth <= found.high
    assert 0.925 <= hits / trials <= 0.985


def test_a_pot_of_all_questions_would_miss_the_mean_over_tasks() -> None:
    easy, hard = (
        drawn(np.random.default_rng(0), 0.9, 1000),
        drawn(np.random.default_rng(1), 0.2, 50),
    )
    pot = wilson(round(sum(easy + hard)), 1050)
    found = mean_of([stratified_proportion({"": easy}), stratified_proportion({"": hard})])
    assert found.low < 0.55 < found.high
    assert pot is not None
    assert not pot.low < 0.55 < pot.high
