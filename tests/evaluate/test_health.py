"""Signs of collapse, each at its boundary."""

from types import SimpleNamespace

import pytest

from prefloop.evaluate.answers import (
    check_guards,
    distinct_2,
    identical_rate,
    mean_length,
    stop_rate,
)
from prefloop.records import Response

OPTIONS = SimpleNamespace(max_kl=2.0, min_distinct2=0.5, min_stop_rate=0.5, max_identical_rate=0.9)
START = {"distinct_2": 0.8}
HEALTHY = {"kl": 2.0, "distinct_2": 0.4, "stop_rate": 0.5, "identical_rate": 0.9}


def test_distinct_2_counts_bigrams_over_the_whole_set():
    assert distinct_2(["a b c", "a b"]) == 2 / 3


def test_distinct_2_never_joins_two_texts():
    assert distinct_2(["a b", "b a"]) == 1.0
    assert distinct_2(["a", "b"]) is None
    assert distinct_2([]) is None


def test_distinct_2_of_a_loop_is_near_zero():
    assert distinct_2(["ha " * 101]) == 0.01


def test_mean_length_leaves_out_responses_of_unknown_length():
    responses = [
        Response(text="a b", token_ids=(1, 2, 3)),
        Response(text="", token_ids=(3,)),
        Response(text="from a file"),
    ]
    assert mean_length(responses) == 2.0
    assert mean_length(responses[2:]) is None


def test_stop_rate_is_the_share_that_ended_by_itself():
    cut, whole = Response(text="a", finish="length"), Response(text="a")
    assert stop_rate([cut, whole, whole, whole]) == 0.75
    assert stop_rate([]) is None


def test_identical_rate_folds_whitespace_but_not_case():
    assert identical_rate([("a  b\n", "a b"), ("A b", "a b")]) == 0.5
    assert identical_rate([]) is None


def test_guards_are_quiet_at_their_bounds():
    assert check_guards(HEALTHY, START, OPTIONS) == []


@pytest.mark.parametrize(
    ("measure", "value", "sentence"),
    [
        ("kl", 2.01, "KL from the initial policy is 2.01 nats/token, above max_kl = 2"),
        (
            "distinct_2",
            0.39,
            "distinct-2 is 0.39, below min_distinct2's share of the start: 0.4",
        ),
        (
            "stop_rate",
            0.49,
            "49.0% of answers end by themselves, below min_stop_rate = 50.0%",
        ),
        (
            "identical_rate",
            0.91,
            "91.0% of rewritten answers equal their draft, above max_identical_rate = 90.0%",
        ),
    ],
)
def test_each_guard_says_what_it_saw_and_its_bound(measure, value, sentence):
    assert check_guards({**HEALTHY, measure: value}, START, OPTIONS) == [sentence]


def test_a_nan_measure_trips_its_guard():
    assert len(check_guards(dict.fromkeys(HEALTHY, float("nan")), START, OPTIONS)) == 4


def test_missing_measures_and_switched_off_guards_trip_nothing():
    off = SimpleNamespace(
        max_kl=None, min_distinct2=None, min_stop_rate=None, max_identical_rate=None
    )
    worst = {"kl": 99.0, "distinct_2": 0.0, "stop_rate": 0.0, "identical_rate": 1.0}
    assert check_guards(dict.fromkeys(HEALTHY), START, OPTIONS) == []
    assert check_guards({}, START, OPTIONS) == []
    assert check_guards({"distinct_2": 0.0}, {}, OPTIONS) == []
    assert check_guards(worst, START, off) == []
