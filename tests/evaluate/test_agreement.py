"""Agreement, leanings and calibration, against values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.evaluate.agreement import Scored, agreement, calibration, position_bias
from prefloop.evaluate.stats import bootstrap_mean, clustered_mean


def row(difference: float | str, *, lengths: tuple[int, int] = (2, 1), cluster: str = "p", **more):
    scores = difference if isinstance(difference, str) else (difference, 0.0)
    return Scored(cluster, more.get("tie", False), *lengths, scores)


def test_a_tie_of_the_judge_counts_one_half_and_a_failure_nothing():
    found = agreement([row(1.0), row(-1.0), row(0.0), row("too long")])
    assert found.agreement.value == pytest.approx(0.5)
    assert found.agreement.count == 3
    assert found.ties.value == pytest.approx(1 / 3)
    assert found.failures.value == pytest.approx(1 / 4)
    assert found.reasons == {"too long": 1}


def test_human_ties_are_counted_and_in_no_agreement():
    found = agreement([row(1.0), row(-5.0, tie=True)])
    assert found.human_ties == 1
    assert found.agreement.value == 1.0


def test_length_bias_is_seen_from_both_sides():
    """Four pairs; people prefer the longer one in three, the judge in all four."""
    rows = [row(1.0), row(2.0), row(0.5), row(-1.0, lengths=(1, 2))]
    found = agreement(rows)
    assert found.agreement.value == 0.75
    assert found.over_longer.value == 0.0
    assert found.prefers_longer.value == 1.0
    assert found.people_prefer_longer == 0.75
    assert found.where_longer_is_better.value == 1.0
    assert found.where_shorter_is_better.value == 0.0
    assert found.length_correlation > 0.7


def test_pairs_of_equal_length_say_nothing_on_length_bias():
    found = agreement([row(1.0, lengths=(3, 3))])
    assert found.prefers_longer is None
    assert found.length_correlation is None
    assert found.over_longer.value == 0.5


def test_nothing_scored_gives_no_shares():
    found = agreement([row("failed")])
    assert found.agreement is None
    assert found.failures.value == 1.0


def test_pairs_of_one_prompt_widen_the_interval():
    values = [float(n // 20 % 2) for n in range(400)]
    together = clustered_mean(values, [str(n // 20) for n in range(400)], seed=0)
    alone = bootstrap_mean(values, seed=0)
    assert together.value == alone.value == 0.5
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_clusters_of_one_are_the_plain_bootstrap():
    values = [float(n % 3 == 0) for n in range(300)]
    together = clustered_mean(values, [str(n) for n in range(300)], seed=0)
    alone = bootstrap_mean(values, seed=0)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high), abs=0.01)


def test_a_judge_that_always_takes_the_first_has_full_position_bias():
    first_shown_wins = position_bias([row(1.0)] * 4, [row(-1.0)] * 4)
    assert first_shown_wins == {"first_wins": 1.0, "changed": 1.0, "pairs": 4.0}
    steady = position_bias([row(1.0), row(-1.0)], [row(1.0), row(-1.0)])
    assert steady == {"first_wins": 0.5, "changed": 0.0, "pairs": 2.0}
    assert position_bias([row("failed")], [row(1.0)]) is None


def test_calibration_by_hand():
    """Two pairs at probability 0.8, one of them wrong: says 0.8, is right half the time."""
    logit = math.log(4)
    found = calibration([row(logit), row(-logit)])
    (only,) = found.bins
    assert only.pairs == 2
    assert only.confidence == pytest.approx(0.8)
    assert only.accuracy == 0.5
    assert found.ece == pytest.approx(0.3)
    assert found.brier == pytest.approx((0.04 + 0.64) / 2)
    assert found.log_loss == pytest.approx(-(math.log(0.8) + math.log(0.2)) / 2)


def test_a_coin_has_the_log_loss_of_a_coin():
    found = calibration([row(0.0)] * 3)
    assert found.log_loss == pytest.approx(math.log(2))
    assert found.brier == 0.25
    assert found.ece == 0.0


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40))
def test_every_pair_is_in_one_bin_and_errors_are_errors(differences):
    found = calibration([row(difference) for difference in differences])
    assert sum(bin.pairs for bin in found.bins) == len(differences)
    assert 0 <= found.ece <= 1
    for bin in found.bins:
        assert bin.low - 1e-9 <= bin.confidence <= bin.high + 1e-9


def test_rank_correlation_puts_ties_at_their_mean_rank():
    """By hand: ranks 1, 2.5, 2.5, 4 beside 1, 2, 3, 4; 4.5 / sqrt(4.5 * 5)."""
    rows = [row(score, lengths=(length, 0)) for score, length in [(1, 1), (2, 2), (2, 3), (3, 4)]]
    assert agreement(rows).length_correlation == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert agreement([row(1.0), row(1.0, lengths=(9, 1))]).length_correlation is None
