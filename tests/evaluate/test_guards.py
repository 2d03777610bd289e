"""Guards: each at its bound, and none that the start deserves as well."""

import pytest

from prefloop.evaluate.guards import check_guards, start_values
from prefloop.recipe.options import GuardOptions
from prefloop.records import RoundResult

OPTIONS = GuardOptions()
START = {"distinct_2": 0.8, "M": 0.4, "train_M": 0.4}
AT_BOUND = {
    "kl": 2.0,
    "distinct_2": 0.4,
    "stop_rate": 0.5,
    "identical_rate": 0.9,
    "flaw_edit_share": 0.5,
    "flaw_unseen": 0.5,
    "M": 0.1,
    "train_M": 0.1,
}
SHARES = ("stop_rate", "identical_rate", "flaw_edit_share", "flaw_unseen")


def test_guards_are_quiet_at_their_bounds():
    assert check_guards(AT_BOUND, START, OPTIONS) == []


@pytest.mark.parametrize(
    ("measure", "value", "sentence"),
    [
        ("kl", 2.01, "KL from the initial policy is 2.01 nats/token, above max_kl = 2"),
        (
            "distinct_2",
            0.39,
            "distinct-2 is 0.39, below min_distinct2's share of the start: 0.4 (the start: 0.8)",
        ),
        ("stop_rate", 0.49, "49.0% of answers end by themselves, below min_stop_rate = 50.0%"),
        (
            "identical_rate",
            0.91,
            "91.0% of rewritten answers equal their draft, above max_identical_rate = 90.0%",
        ),
        (
            "flaw_edit_share",
            0.51,
            "planted flaws change 51.0% of the words, above max_flaw_edit_share = 50.0%",
        ),
        (
            "flaw_unseen",
            0.51,
            "51.0% of flawed answers are as likely to the policy as what they were made from, above "
            "max_unseen_flaws = 50.0%",
        ),
        (
            "M",
            0.09,
            "AROP's margin M is 0.09, below min_margin's share of the start: 0.1 (the start: 0.4)",
        ),
    ],
)
def test_each_guard_says_what_it_saw_and_its_bound(measure, value, sentence):
    # Pairs' margins are read where none were measured on held-out prompts, and never beside them.
    seen = {**AT_BOUND, "train_M": 0.0, measure: value}
    assert check_guards(seen, START, OPTIONS) == [sentence]


def test_margins_of_pairs_are_read_where_none_are_held_out():
    [sentence] = check_guards({"train_M": 0.01}, START, OPTIONS)
    assert sentence.startswith("AROP's margin M of pairs is 0.01, below min_margin's share")


@pytest.mark.parametrize("value", [0.0, 0.02, 0.3, 0.7, 0.98, 1.0])
@pytest.mark.parametrize("measure", [*SHARES, "distinct_2", "M", "train_M"])
def test_a_policy_that_equals_its_start_trips_nothing(measure, value):
    assert check_guards({measure: value}, {measure: value}, OPTIONS) == []


@pytest.mark.parametrize(
    ("measure", "start", "allowed", "tripping"),
    [
        # Of 0.30 four fifths must be left; of the 0.05 to 1.0 as well.
        ("stop_rate", 0.30, 0.25, 0.23),
        ("identical_rate", 0.95, 0.955, 0.97),
        ("flaw_edit_share", 0.8, 0.83, 0.85),
        ("flaw_unseen", 0.6, 0.67, 0.69),
    ],
)
def test_where_the_start_is_past_a_limit_the_policy_must_be_clearly_worse(
    measure, start, allowed, tripping
):
    assert check_guards({measure: allowed}, {measure: start}, OPTIONS) == []
    [sentence] = check_guards({measure: tripping}, {measure: start}, OPTIONS)
    assert "what a start past m" in sentence
    assert f"(the start: {start:.1%})" in sentence


def test_a_start_within_the_limit_leaves_the_limit_as_it_is():
    [sentence] = check_guards({"stop_rate": 0.49}, {"stop_rate": 0.55}, OPTIONS)
    assert "below min_stop_rate = 50.0% (the start: 55.0%)" in sentence


def test_a_nan_measure_trips_its_guard_and_a_start_of_nan_excuses_nothing():
    nan = float("nan")
    assert len(check_guards(dict.fromkeys(AT_BOUND, nan), START, OPTIONS)) == 7
    assert len(check_guards(dict.fromkeys(SHARES, nan), dict.fromkeys(SHARES, nan), OPTIONS)) == 4
    for start in ({}, {"M": nan}):
        [sentence] = check_guards({"M": nan}, start, OPTIONS)
        assert sentence == "AROP's margin M is nan, below min_margin's share of the start"


def test_missing_measures_trip_nothing():
    assert check_guards(dict.fromkeys(AT_BOUND), START, OPTIONS) == []
    assert check_guards({}, START, OPTIONS) == []
    assert check_guards({"distinct_2": 0.0, "M": 0.0}, {}, OPTIONS) == []


def test_what_only_rounds_have_is_compared_with_the_first_of_them():
    results = [
        RoundResult(round=-1, measures={"stop_rate": 0.3, "identical_rate": None}),
        RoundResult(round=0, measures={"stop_rate": 0.9, "train_M": 0.4, "identical_rate": 0.1}),
        RoundResult(round=1, measures={"stop_rate": 0.9, "train_M": 0.2, "identical_rate": 0.2}),
    ]
    assert start_values(results) == {"stop_rate": 0.3, "train_M": 0.4, "identical_rate": 0.1}
    assert start_values([]) == {}


def test_a_first_value_of_nan_is_no_start():
    results = [
        RoundResult(round=number, measures={"distinct_2": value})
        for number, value in ((-1, float("nan")), (0, 0.8), (1, 0.7))
    ]
    assert start_values(results) == {"distinct_2": 0.8}
