"""Agreement between people: published and hand-made values, another library's, and the edges."""

from __future__ import annotations

import random

import pytest

from prefloop.evaluate.agreement import cohen_kappa, krippendorff_alpha

# Krippendorff (2011), Computing Krippendorff's Alpha-Reliability: the data of its sections A, B and C.
BINARY = ("0100000010", "1110010000")
NOMINAL = ("aabbdcccedda", "babbbccceddd")
MISSING = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


def units(rows: tuple[str, ...]) -> list[dict[str, str]]:
    """Raters' labels, a text a rater and a character a unit, as units; a dot is no label."""
    return [
        {str(rater): row[unit] for rater, row in enumerate(rows) if row[unit] != "."}
        for unit in range(len(rows[0]))
    ]


@pytest.mark.parametrize(("rows", "alpha"), [(BINARY, 0.095), (NOMINAL, 0.692), (MISSING, 0.743)])
def test_alpha_has_the_published_values(rows: tuple[str, ...], alpha: float) -> None:
    found = krippendorff_alpha(units(rows))
    assert found is not None
    assert found.value == pytest.approx(alpha, abs=5e-4)
    assert found.low <= found.value <= found.high


def test_alpha_counts_only_units_with_two_labels() -> None:
    found = krippendorff_alpha(units(MISSING))
    assert found is not None
    assert found.count == 11  # the last unit has one label


def test_kappa_of_fifty_units_worked_out_by_hand() -> None:
    """20 both yes, 15 both no, 5 yes and no, 10 no and yes.

    p_o = 35/50 = 0.7; p_e = (25·30 + 25·20)/50² = 0.5; kappa = 0.2/0.5 = 0.4.
    """
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = cohen_kappa(first, second)
    assert found is not None
    assert found.value == pytest.approx(0.4)
    assert found.count == 50
    # The usual large-sample interval is 0.4 ± 1.96 · 0.13.
    assert found.low == pytest.approx(0.15, abs=0.05)
    assert found.high == pytest.approx(0.65, abs=0.05)


def test_full_agreement_is_one_and_opposition_is_less_than_chance() -> None:
    same = cohen_kappa("abca", "abca")
    assert same is not None
    assert (same.value, same.low, same.high) == (1, 1, 1)
    opposed = cohen_kappa("abab", "baba")
    assert opposed is not None
    assert opposed.value == pytest.approx(-1)


@pytest.mark.parametrize("labels", ["", "aaaa"])
def test_where_nothing_can_be_told_from_chance_there_is_no_figure(labels: str) -> None:
    assert cohen_kappa(labels, labels) is None
    assert krippendorff_alpha(units((labels, labels)) if labels else []) is None


def test_one_unit_is_enough_to_disagree_on() -> None:
    found = krippendorff_alpha([{"x": "a", "y": "b"}])
    assert found is not None
    assert (found.value, found.count) == (0, 1)


def test_people_who_guess_agree_as_chance_does_and_the_interval_covers_it() -> None:
    generator = random.Random(0)
    covered = 0
    for trial in range(60):
        first, second = (generator.choices("abt", [5, 4, 1], k=80) for _ in range(2))
        found = cohen_kappa(first, second, seed=trial)
        assert found is not None
        covered += found.low <= 0 <= found.high
    assert 0.90 <= covered / 60 <= 1


@pytest.mark.oracle
def test_kappa_equals_scikit_learns() -> None:
    metrics = pytest.importorskip(
        "sklearn.metrics", reason="needs the extra eval, which make setup installs"
    )
    generator = random.Random(1)
    first, second = (generator.choices("abt", [5, 4, 2], k=60) for _ in range(2))
    found = cohen_kappa(first, second)
    assert found is not None
    assert found.value == pytest.approx(metrics.cohen_kappa_score(first, second))
