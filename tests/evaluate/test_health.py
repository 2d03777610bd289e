"""Signs of collapse, each at its boundary."""

from prefloop.evaluate.answers import (
    distinct_2,
    identical_rate,
    mean_length,
    stop_rate,
)
from prefloop.records import Response


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
