"""Win rate: ties, skipped prompts, and what must not pass as a score."""

import pytest

from prefloop.errors import DataError, JudgeError
from prefloop.evaluate.win_rates import steps_to, win_rate


def test_ties_count_one_half():
    found = win_rate([2, 1, 0, 5], [1, 1, 1, 1], seed=0)
    assert (found.wins, found.ties, found.losses, found.skipped) == (2, 1, 1, 0)
    assert found.estimate.value == 2.5 / 4
    assert found.estimate.low < found.estimate.value < found.estimate.high


def test_prompts_without_a_score_are_skipped_and_counted():
    found = win_rate([2, None, 3, None], [1, 1, None, None], seed=0)
    assert (found.wins, found.skipped) == (1, 3)
    assert (found.estimate.value, found.estimate.count) == (1.0, 1)


def test_nothing_judged_has_no_win_rate():
    assert win_rate([None], [1.0], seed=0).estimate is None


def test_win_rate_of_the_two_sides_sum_to_one():
    own, other = [0.3, 0.5, 0.5, 0.9, 0.1], [0.4, 0.5, 0.2, 0.1, 0.0]
    there, back = win_rate(own, other, seed=0), win_rate(other, own, seed=0)
    assert there.estimate.value + back.estimate.value == pytest.approx(1.0)


def test_unequal_sides_are_refused():
    with pytest.raises(DataError, match="1 scores against the opponent's 2"):
        win_rate([1.0], [1.0, 2.0], seed=0)


def test_a_nan_score_is_an_error_and_not_a_tie():
    with pytest.raises(JudgeError, match="prompt 1 with NaN"):
        win_rate([1.0, float("nan")], [0.0, 0.0], seed=0)


def test_steps_to_ninety_percent_of_the_highest_win_rate():
    curve = [(2, 0.5), (4, 0.53), (6, 0.56), (8, 0.6), (10, 0.52)]
    assert steps_to(curve, 0.9) == 6
    assert steps_to(curve, 1.0) == 8
    assert steps_to([(5, 0.3)], 0.9) == 5
    assert steps_to([], 0.9) is None
