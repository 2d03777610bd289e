"""Paired differences and the sign-flip test."""

from __future__ import annotations

import numpy as np
import pytest

from prefloop.evaluate.measures import Item
from prefloop.evaluate.significance import differences, sign_flip


def items(values: dict[str, float], *, cluster: str = "", group: str = "") -> list[Item]:
    return [
        Item(id=name, values={"m": value}, cluster=cluster, group=group)
        for name, value in values.items()
    ]


def test_only_items_that_both_have_are_compared() -> None:
    first = items({"a": 0.0, "b": 0.5, "c": 1.0})
    (found,) = differences(first, items({"b": 1.0, "c": 1.0, "d": 0.0}), seed=0)
    assert found.metric == "m"
    assert found.estimate.value == 0.25
    assert found.estimate.count == 2


def test_one_id_in_two_groups_is_two_items() -> None:
    first = [*items({"1": 0.0}, group="arc"), *items({"1": 1.0}, group="mmlu")]
    second = [*items({"1": 1.0}, group="mmlu"), *items({"1": 0.5}, group="arc")]
    (found,) = differences(first, second, seed=0)
    assert found.estimate.value == 0.25
    assert found.estimate.count == 2


def test_nothing_in_common_is_no_difference() -> None:
    assert differences(items({"a": 1.0}), items({"b": 1.0}), seed=0) == []


def test_items_of_one_cluster_count_as_one_when_chance_is_weighed() -> None:
    names = [str(n) for n in range(40)]
    zeros, ones = dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0)
    (alone,) = differences(items(zeros), items(ones), seed=0)
    (together,) = differences(items(zeros, cluster="p"), items(ones, cluster="p"), seed=0)
    assert alone.p < 0.001
    assert together.p == 1.0


def test_sign_flip_by_hand() -> None:
    # Eight patterns of (1, 2, 3): only all plus and all minus are as far from 0 as 6.
    assert sign_flip([1.0, 2.0, 3.0], ["a", "b", "c"], seed=0) == 2 / 8
    # Of (1, 1, -1), |sum| is 1 or 3: every pattern is at least as far as 1.
    assert sign_flip([1.0, 1.0, -1.0], ["a", "b", "c"], seed=0) == 1.0


@pytest.mark.parametrize("values", [[0.7], [0.0] * 30, [0.0]])
def test_one_value_or_no_difference_says_nothing(values: list[float]) -> None:
    assert sign_flip(values, [str(n) for n in range(len(values))], seed=0) == 1.0


def test_drawn_patterns_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(0.6, 1.0, size=12).tolist()
    names = [str(n) for n in range(12)]
    exact = sign_flip(values, names, seed=0)
    monkeypatch.setattr("prefloop.evaluate.significance._EXACT_CLUSTERS", 0)
    assert sign_flip(values, names, seed=0) == pytest.approx(exact, abs=0.012)


def test_without_a_difference_p_is_below_a_bound_as_often_as_the_bound_says() -> None:
    generator = np.random.default_rng(0)
    names = [str(n) for n in range(30)]
    ps = [sign_flip(generator.choice([-1.0, 0.0, 1.0], size=30), names, seed=n) for n in range(400)]
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=0.033)
