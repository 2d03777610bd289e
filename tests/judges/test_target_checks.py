"""Rules against the target: each check by itself, and what has no verdict."""

import pytest

from prefloop.judges import EMPTY, NO_TARGET
from prefloop.judges.target_checks import TargetChecks
from prefloop.records import Message, Prompt


def verdict(target, *answers, **options):
    prompt = Prompt(id="p", messages=(Message(role="user", content="?"),), target=target)
    [found] = TargetChecks(**options).open(None, None).score([prompt], [answers])
    return found


@pytest.mark.parametrize(
    ("target", "answer", "score"),
    [
        ("She doesn't like coffee.", "she doesn’t like coffee.", 1.0),
        ("Paris.", "Rome.", 2 / 3),  # length and form
        ("Paris.", "Rome", 1 / 3),  # length
        ("Paris.", "It is the well known city of Rome.", 1 / 3),  # form
        ("It is 1,000 m.", "It is 1000 m.", 1.0),
        ("It is 1,000 m.", "It is 100 m.", 2 / 4),
        (
            "It is 12.5 %",
            "It is 12.5 %, not 13 %",
            2 / 4,
        ),  # one number more; like length, like form
        ("- red\n- green", "- blue\n- grey", 2 / 3),
        ("- red\n- green", "blue, grey", 1 / 3),
    ],
)
def test_the_score_is_the_share_of_checks_that_are_passed(target, answer, score):
    assert verdict(target, answer) == pytest.approx((score,))


def test_how_much_longer_an_answer_may_be_is_an_option():
    assert verdict("one two", "one two three four") == pytest.approx((2 / 3,))
    assert verdict("one two", "one two three four", length_factor=1.5) == pytest.approx((1 / 3,))


def test_without_a_target_or_an_answer_there_is_no_verdict():
    assert verdict(None, "Paris.") is NO_TARGET
    assert verdict("Paris.", " ") is EMPTY
