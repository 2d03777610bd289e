"""SPAC: a pair beside the policy's own answer; both forms of equation 9."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import Verdict
from prefloop.methods import Actors
from prefloop.methods.spac import SPAC
from prefloop.records import Candidates, Pair, Prompt, Reject
from prefloop.train.losses import GroupLogps
from tests.conftest import labelled_prompts

PROMPTS = labelled_prompts(3)


def play(method: SPAC, prompts: Sequence[Prompt], judge: Any = None) -> list[Pair | Reject]:
    actors = Actors(FakeEngine(), judge, PromptSet("compact"), 0, 7)
    groups = [g for g in method.generate(prompts, actors) if isinstance(g, Candidates)]
    ranked = [g for g in method.rank(groups, actors) if isinstance(g, Candidates)]
    return list(method.pair(ranked, round=1))


def test_a_labelled_pair_is_set_beside_the_policys_own_answer() -> None:
    for number, pair in enumerate(play(SPAC(), PROMPTS)):
        assert isinstance(pair, Pair)
        assert (pair.chosen, pair.rejected) == (f"good {number}", f"bad {number}")
        assert pair.sample not in (None, "", pair.chosen, pair.rejected)


def test_of_drafts_the_judge_orders_two_and_the_sample_is_a_third() -> None:
    seen: list[Sequence[str]] = []

    class Judge:
        def score(self, prompts: Any, groups: Sequence[Sequence[str]]) -> list[Verdict]:
            seen.extend(groups)
            return [(1.0, 2.0)] * len(groups)

    pairs = play(SPAC(pairs="drafts"), PROMPTS, Judge())
    assert [len(group) for group in seen] == [2, 2, 2]
    for pair, group in zip(pairs, seen, strict=True):
        assert isinstance(pair, Pair)
        assert (pair.chosen, pair.rejected) == (group[1], group[0])
        assert pair.sample not in group


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # r(y) = 1, r(y+) = 2, r(y-) = -3, eta 0.1, lambda 2.
        ("linear", 0.1 * (1 - 2) + 2 * math.log(1 + math.exp(-0.5))),
        ("smoothed", math.log(1 + math.exp(-0.1)) + 2 * math.log(1 + math.exp(-0.5))),
    ],
)
def test_both_forms_by_hand(objective: Any, expected: float) -> None:
    values = {"sample": 1.0, "chosen": 2.0, "rejected": -3.0}
    given = GroupLogps(
        policy={role: torch.tensor([value - 10]) for role, value in values.items()},
        reference={role: torch.tensor([-10.0]) for role in values},
        lengths={role: torch.ones(1) for role in values},
        margin_B=torch.zeros(1),
    )
    output = SPAC(objective=objective, lam=2.0).loss(given, 0.0)
    assert output.loss_B.item() == pytest.approx(expected)
    assert output.metrics["reward_sample"].item() == pytest.approx(0.1)
    assert output.metrics["reward_margin"].item() == pytest.approx(0.5)
