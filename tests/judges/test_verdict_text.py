"""Malformed verdicts: a counted failure or the right verdict, never a made-up score."""

import pytest

from prefloop.judges._verdict_text import NO_VERDICT, TWO_VERDICTS, read_verdict
from prefloop.judges.self_judge import RATINGS, SIDES, SIDES_OR_TIE

RATED = [
    ("4", "4"),
    (" 4.\n", "4"),
    ("**4**", "4"),
    ("Rating: 4", "4"),
    ("Score = 4/5", "4"),
    ("[[4]]", "4"),
    ('"4"', "4"),
    ("4\n\nThe answer is correct and clear.", "4"),
    ("The answer has 2 errors in 3 lines.\nRating: 2", "2"),
    ("3\n3", "3"),
    # Other languages and scripts: the number is what counts, its label may be anything.
    ("Bewertung: 4", "4"),
    ("Оценка: 4", "4"),
    ("评分：４", "4"),
    ("Note : 4/5", "4"),
    # No rating.
    ("", NO_VERDICT),
    ("The answer is good.", NO_VERDICT),
    ("four", NO_VERDICT),
    ("vier", NO_VERDICT),
    ("四", NO_VERDICT),
    ("IV", NO_VERDICT),
    # No rating of the scale.
    ("0", NO_VERDICT),
    ("6", NO_VERDICT),
    ("10", NO_VERDICT),
    ("4.5", NO_VERDICT),
    ("-4", NO_VERDICT),
    ("8/10", NO_VERDICT),
    ("4/10", NO_VERDICT),
    ("Rating: 45", NO_VERDICT),
    # Refusals, and numbers that are no verdicts.
    ("I'm sorry, but I can't rate this answer.", NO_VERDICT),
    ("I cannot rate it, because 2 facts are missing", NO_VERDICT),
    ("Not a 5", NO_VERDICT),
    ("I would not give it 5", NO_VERDICT),
    ("1. It is short.\n2. It is wrong.", NO_VERDICT),
    ("between 3 and 4", NO_VERDICT),
    ("3-4", NO_VERDICT),
    ("3 or 4", NO_VERDICT),
    # Two ratings.
    ("3\n4", TWO_VERDICTS),
    ("Rating: 2\nRating: 5", TWO_VERDICTS),
    ("Style: 5\nTruth: 1", TWO_VERDICTS),
]

CHOSEN = [
    ("A", "A"),
    ("b", "B"),
    ("[[B]]", "B"),
    ("Answer A.", "A"),
    ("**Answer B**", "B"),
    ("Verdict: B", "B"),
    ("Winner: Response A", "A"),
    ("(B)", "B"),
    ("A\nBecause it names the river.", "A"),
    ("A or B", NO_VERDICT),
    ("A and B are equally good", NO_VERDICT),
    ("Neither A nor B", NO_VERDICT),
    ("A better question would be this one.", NO_VERDICT),
    ("Both", NO_VERDICT),
    ("C", NO_VERDICT),
    ("I can't choose.", NO_VERDICT),
    ("Not A", NO_VERDICT),
    ("A\nB", TWO_VERDICTS),
]


@pytest.mark.parametrize(("reply", "expected"), RATED)
def test_a_rating_is_read_or_the_failure_named(reply: str, expected: str) -> None:
    assert outcome(reply, RATINGS) == expected


@pytest.mark.parametrize(("reply", "expected"), CHOSEN)
def test_a_side_is_read_or_the_failure_named(reply: str, expected: str) -> None:
    assert outcome(reply, SIDES) == expected


def test_the_third_choice_is_read_only_where_it_was_offered() -> None:
    assert outcome("C", SIDES_OR_TIE) == "C"
    assert outcome("C", SIDES) == NO_VERDICT


def outcome(reply: str, options: tuple[str, ...]) -> str:
    try:
        return read_verdict(reply, options)
    except ValueError as error:
        return str(error)
