"""SPIN: the target against the policy's own answer; DPO under another name."""

import math
from typing import Any

import pytest
import torch

from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.methods import Actors
from prefloop.methods.dpo import DPO
from prefloop.methods.spin import SPIN
from prefloop.recipe import Recipe
from prefloop.records import Candidates, Message, Pair, Prompt, Reject
from prefloop.train.losses import GroupLogps

PROMPT = Prompt(id="p", messages=(Message(role="user", content="Question?"),), target="T")


def only(engine: FakeEngine, method: SPIN) -> Pair | Reject:
    actors = Actors(engine, None, PromptSet("compact"), 0, 7)
    [found] = method.generate([PROMPT], actors)
    assert isinstance(found, Candidates)
    [result] = method.pair(method.rank([found], actors), round=1)  # type: ignore[arg-type]
    return result


def says(text: str) -> FakeEngine:
    return FakeEngine(lambda request, seed: text)


def logps(seed: int = 0) -> GroupLogps:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> dict[str, torch.Tensor]:
        return {r: -30 * torch.rand(6, generator=generator).double() for r in SPIN.roles}

    return GroupLogps(draw(), draw(), dict.fromkeys(SPIN.roles, torch.ones(6)), torch.zeros(6))


def test_the_target_is_chosen_and_the_policys_answer_rejected() -> None:
    pair = only(says("mine"), SPIN())
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected, pair.target) == ("T", "mine", "T")
    assert pair.origin == {"chosen": "target", "rejected": "sample"}


@pytest.mark.parametrize(("text", "reason"), [("", "empty answer"), (" T ", "identical")])
def test_an_answer_that_teaches_nothing_is_a_reject(text: str, reason: str) -> None:
    reject = only(says(text), SPIN())
    assert isinstance(reject, Reject)
    assert reject.reason == reason


@pytest.mark.parametrize("seed", range(3))
def test_its_loss_is_dpos_on_target_and_sample(seed: int) -> None:
    spin, dpo = (method(beta=0.3).loss(logps(seed), 0.0) for method in (SPIN, DPO))
    assert torch.equal(spin.loss_B, dpo.loss_B)
    assert spin.metrics.keys() == dpo.metrics.keys()


def test_its_loss_is_equation_4_7_by_hand() -> None:
    """log(1 + exp(-(lambda r(target) - lambda r(sample)))), r = 2 and -3, lambda 0.1."""
    given = GroupLogps(
        policy={"chosen": torch.tensor([-8.0]), "rejected": torch.tensor([-13.0])},
        reference=dict.fromkeys(SPIN.roles, torch.tensor([-10.0])),
        lengths=dict.fromkeys(SPIN.roles, torch.ones(1)),
        margin_B=torch.zeros(1),
    )
    assert SPIN().loss(given, 0.0).loss_B.item() == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_beta_is_that_of_the_round_and_the_last_one_holds_on() -> None:
    given = logps()
    for round, beta in enumerate((0.1, 0.1, 0.1, 5.0, 5.0)):
        found = SPIN().in_round(round).loss(given, 0.0).loss_B
        assert torch.equal(found, DPO(beta=beta).loss(given, 0.0).loss_B)
    one = SPIN(beta=0.7)
    assert one.in_round(3) is one


def test_its_schedule_is_the_papers() -> None:
    """5e-7 in iterations 0 and 1, 1e-7 in 2 and 3; a rate of the user's falls likewise."""

    def rates(**sections: Any) -> list[float]:
        recipe = Recipe.model_validate({"name": "r", "method": {"name": "spin"}, **sections})
        return [recipe.train.lr * recipe.loop.rate_factor(n) for n in range(recipe.loop.rounds)]

    assert rates() == pytest.approx([5e-7, 5e-7, 1e-7, 1e-7])
    assert rates(train={"lr": 1e-4}) == pytest.approx([1e-4, 1e-4, 2e-5, 2e-5])
    assert rates(loop={"lr_factors": [1.0]}) == pytest.approx([5e-7] * 4)
