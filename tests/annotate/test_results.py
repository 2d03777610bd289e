"""What votes come to: win rates, intervals, agreement and position, on votes with known figures."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from prefloop.annotate.items import Comparison, Item
from prefloop.annotate.results import results
from prefloop.annotate.votes import Ballots, Joined, Vote
from prefloop.evaluate.stats import bootstrap_mean
from prefloop.report.annotations import show_annotations


def found(votes: dict[str, str], identical: int = 0) -> dict[str, Any]:
    """Results of votes by person: a, b, t, s (skipped), a character an item; a space is no vote.

    Odd items show B first.
    """
    count = max(map(len, votes.values()))
    items = {f"i{n}": Item(f"i{n}", (), {"a": "x", "b": "y"}) for n in range(count)}
    ballots = Ballots()
    names: Any = {"a": "a", "b": "b", "t": "tie", "s": "skip"}
    for name, choices in votes.items():
        ballots.apply(Joined(annotator=name))
        for n, letter in enumerate(choices):
            if letter != " ":
                ballots.apply(
                    Vote(
                        annotator=name,
                        item=f"i{n}",
                        choice=names[letter],
                        first="b" if n % 2 else "a",
                        reason="unclear" if letter == "s" else None,
                        seconds=n,
                    )
                )
    return results(Comparison({"a": "A", "b": "B"}, items, identical), ballots)


def test_ties_count_one_half_and_skips_not_at_all() -> None:
    ann = found({"Ann": "aaabts"})["everybody"]
    assert ann["win_rate"]["value"] == pytest.approx(3.5 / 5)
    assert (ann["votes"], ann["a"], ann["tie"], ann["b"], ann["skipped"]) == (5, 3, 1, 1, 1)
    assert ann["reasons"] == {"unclear": 1}
    assert ann["median_seconds"] == 2.5


def test_every_prompt_weighs_the_same_however_many_voted_on_it() -> None:
    both = found({"Ann": "ab", "Bob": "a ", "Cid": "a "})["everybody"]["win_rate"]
    assert (both["value"], both["count"]) == (0.5, 2)
    split = found({"Ann": "ab", "Bob": "ba"})["everybody"]["win_rate"]
    assert (split["value"], split["low"], split["high"]) == (0.5, 0.5, 0.5)


def test_the_interval_is_that_of_prompts_and_not_of_votes() -> None:
    """Three people who always agree know no more than one of them."""
    choices = "ab" * 20
    one = found({"Ann": choices})["everybody"]["win_rate"]
    three = found({"Ann": choices, "Bob": choices, "Cid": choices})["everybody"]["win_rate"]
    values = [value for _, value in sorted((f"i{n}", 1.0 - n % 2) for n in range(40))]
    expected = bootstrap_mean(values, seed=0)
    assert expected is not None
    assert one == three == vars(expected)


def test_identical_answers_are_ties_once_all_others_are_judged() -> None:
    whole = found({"Ann": "aaaa"}, identical=4)
    assert whole["with_identical"]["value"] == 0.75
    assert whole["everybody"]["win_rate"]["value"] == 1
    assert found({"Ann": "aaa s"}, identical=4)["with_identical"] is None


def test_two_people_get_kappa_and_three_get_alpha() -> None:
    two = found({"Ann": "aabb", "Bob": "aabt"})["agreement"]
    # p_o = 3/4; p_e = 1/2 · 1/2 + 1/2 · 1/4 = 3/8; (3/4 − 3/8) / (5/8) = 0.6
    assert two["measure"] == "Cohen's kappa"
    assert two["estimate"]["value"] == pytest.approx(0.6)
    assert (two["items"], two["same"]) == (4, 0.75)
    three = found({"Ann": "aab", "Bob": "aab", "Cid": "a  "})["agreement"]
    assert (three["measure"], three["people"], three["items"]) == ("Krippendorff's alpha", 3, 3)
    assert three["estimate"]["value"] == 1
    assert found({"Ann": "aa ", "Bob": "  a"})["agreement"] is None
    assert found({"Ann": "aa", "Bob": "ss"})["agreement"] is None


def test_taking_always_the_first_answer_shows_as_position_and_not_as_a_winner() -> None:
    lazy = found({"Ann": "ab" * 10})
    assert lazy["everybody"]["first_wins"]["value"] == 1
    assert lazy["everybody"]["win_rate"]["value"] == 0.5
    assert "the answer shown first won 1.000 of the votes" in printed(lazy)


def printed(report: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=60)
    show_annotations(json.loads(json.dumps(report)), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_report_names_the_winner_only_where_the_interval_does() -> None:
    assert "1.000 to 1.000: A is better" in printed(found({"Ann": "a" * 10}))
    assert ": B is better" in printed(found({"Ann": "b" * 12 + "a"}))
    assert ": no difference can be told" in printed(found({"Ann": "ab" * 10}))
    assert "too few prompts to trust that interval" in printed(found({"Ann": "aaa"}))


def test_the_report_holds_without_any_vote() -> None:
    text = printed(found({"Ann": "  "}))
    assert "0 of 2 prompts judged" in text
    assert "A's win rate: no votes yet" in text


def test_the_table_has_a_line_for_each_person_and_one_together() -> None:
    lines = printed(found({"Ann": "aab", "Bob": "abs"})).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("Ann"))
    assert lines[start].split()[:6] == ["Ann", "3", "2", "0", "1", "0"]
    assert lines[start + 1].split()[:6] == ["Bob", "2", "1", "0", "1", "1"]
    assert lines[start + 2].split()[:6] == ["together", "5", "3", "0", "2", "1"]
