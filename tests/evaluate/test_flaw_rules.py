"""Kinds of flaws by rules: each rule by an example, and all of them beside 100 pairs labelled one by one.

flaws_by_hand.jsonl: answers of SmolLM2-135M to the embedded instructions, 63 with an infilled word, 37 that the
model was asked to flaw (equal and cut-off copies left out), labelled by one annotator (a language model reading)
before the rules ran on them.
"""

import json
from pathlib import Path

import pytest

from prefloop.evaluate.agreement import cohen_kappa
from prefloop.evaluate.flaw_rules import KINDS, flaw_kind

BY_HAND = Path(__file__).parent / "flaws_by_hand.jsonl"
ROWS = [json.loads(line) for line in BY_HAND.read_text(encoding="utf-8").splitlines()]
GOOD = "Mercury is the closest planet to the Sun, about 58 million kilometres away."


@pytest.mark.parametrize(
    ("rejected", "kind"),
    [
        ("Venus is the closest planet to the Sun, about 58 million kilometres away.", "factual"),
        (
            "Mercury is not the closest planet to the Sun, about 58 million kilometres away.",
            "factual",
        ),
        ("Mercury is the closest planet to the Sun, about 85 million kilometres away.", "number"),
        ("Mercury is the closest planet to the Sun, about 58 billion kilometres away.", "number"),
        (
            "Mercury is perhaps the closest planet to the Sun, about 58 million kilometres away.",
            "over-qualified",
        ),
        (
            "Obviously, Mercury is the closest planet to the Sun, about 58 million kilometres away.",
            "tone",
        ),
        ("Mercury is the closest planet to the Sun.", "omission"),
        ("Mercury is the closest planet, about 58 million kilometres away.", "omission"),
        ("I cannot help you with that.", "refusal"),
        (
            "Mercury is the closest planet to the Sun, idiot, about 58 million kilometres away.",
            "toxic",
        ),
        ("Planets go round a star at very different speeds.", "rewritten"),
        ("Mercury is the closest planets to the Sun, about 58 million kilometres away.", "other"),
        ("Mercury is the closest planet of the Sun, about 58 million kilometres away.", "other"),
        ("Mercury is the closest planet to the Sun - about 58 million kilometres away", "other"),
        (f"  {GOOD}\n", "other"),
    ],
)
def test_each_kind_by_an_example(rejected: str, kind: str) -> None:
    assert flaw_kind(GOOD, rejected) == kind


def test_a_minus_sign_is_part_of_the_number() -> None:
    assert flaw_kind("It is -1 degree in May.", "It is 1 degree in May.") == "number"


def test_a_refusal_made_of_a_refusal_is_none() -> None:
    assert (
        flaw_kind("I cannot help with that poison.", "I cannot help with that potion.") != "refusal"
    )


def test_how_much_may_differ_is_an_option() -> None:
    assert flaw_kind("a red car", "a blue bus") == "rewritten"
    assert flaw_kind("a red car", "a blue bus", rewritten_from=0.7) == "factual"


def agreement(part: str) -> tuple[int, float, float]:
    rows = [row for row in ROWS if row["id"].startswith(part)]
    labels = [row["label"] for row in rows]
    told = [flaw_kind(row["chosen"], row["rejected"]) for row in rows]
    kappa = cohen_kappa(labels, told)
    assert kappa is not None
    right = sum(a == b for a, b in zip(labels, told, strict=True))
    return len(rows), right / len(rows), kappa.value


def test_the_pairs_by_hand_are_a_hundred_with_known_labels() -> None:
    assert len(ROWS) == len({row["id"] for row in ROWS}) == 100
    assert {row["label"] for row in ROWS} <= set(KINDS)


@pytest.mark.parametrize(
    ("part", "pairs", "accuracy", "kappa"),
    [("infill/", 63, 0.58, 0.32), ("prompt/", 37, 0.67, 0.54)],
)
def test_rules_agree_with_the_annotator_as_often_as_the_docs_say(
    part: str, pairs: int, accuracy: float, kappa: float
) -> None:
    """Floors are what was measured: a rule that agrees less often is seen here."""
    found = agreement(part)
    assert found[0] == pairs
    assert found[1] >= accuracy
    assert found[2] >= kappa
