"""PPO: what is drawn, what is rewarded, and how its parts make targets and a loss."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from prefloop.errors import RecipeError
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict
from prefloop.methods import Actors
from prefloop.methods.ppo import PPO
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_recipe
from prefloop.records import Candidates, Message, Pair, Prompt, Reject, Response
from prefloop.train import ppo

PROMPTS = [
    Prompt(id=f"p{n}", messages=(Message(role="user", content=f"Question {n}?"),)) for n in range(3)
]


class FakeJudge:
    """Scores the second prompt not at all and the others by their place; every group must be one answer."""

    def score(self, prompts: Any, groups: Any) -> list[Any]:
        assert all(len(group) == 1 for group in groups)
        return [NoVerdict("no idea") if n == 1 else (float(n),) for n in range(len(groups))]


def actors() -> Actors:
    return Actors(FakeEngine(), FakeJudge(), PromptSet("compact"), 0, 7)


def answered(text: str, finish: Any = "stop", score: float = 0.5) -> Candidates:
    answer = Response(text=text, finish=finish)
    return Candidates(prompt=PROMPTS[0], responses={"answer": answer}, scores={"answer": score})


def only(method: PPO, group: Candidates) -> Pair | Reject:
    [result] = method.pair([group], round=3)
    return result


def rollout(scores: list[float], apart: float = 0.0) -> ppo.Rollout:
    """Two answers of two tokens and of one; policy and reference `apart` nats a token."""
    mask = torch.tensor([[True, True], [True, False]])
    logps = torch.where(mask, torch.tensor(-1.0), 0.0)
    return ppo.Rollout(
        logps_NT=logps,
        reference_NT=torch.where(mask, logps - apart, 0.0),
        values_NT=torch.zeros(2, 2),
        mask_NT=mask,
        scores_N=torch.tensor(scores),
    )


PLAIN = PPO(normalize_reward=False, reward_clip=None, whiten=False)


# Data.


def test_each_answer_is_scored_by_itself_and_no_verdict_is_a_reject() -> None:
    method = PPO()
    groups = [g for g in method.generate(PROMPTS, actors()) if isinstance(g, Candidates)]
    assert [list(group.responses) for group in groups] == [["answer"]] * 3
    first, second, third = method.rank(groups, actors())
    assert isinstance(first, Candidates)
    assert first.scores == {"answer": 0.0}
    assert isinstance(second, Reject)
    assert (second.reason, second.detail) == ("no verdict", "no idea")
    assert isinstance(third, Candidates)
    assert third.scores == {"answer": 2.0}


def test_an_answer_that_was_cut_off_loses_the_penalty_and_has_no_end_of_turn() -> None:
    whole, cut = (only(PPO(cut_off_penalty=0.2), answered("Yes", f)) for f in ("stop", "length"))
    assert isinstance(whole, Pair)
    assert isinstance(cut, Pair)
    assert whole.scores == {"chosen": 0.5}
    assert cut.scores == {"chosen": pytest.approx(0.3)}
    assert (whole.unfinished, cut.unfinished) == ((), ("chosen",))
    assert (whole.chosen, whole.rejected) == ("Yes", "")


def test_an_empty_answer_is_a_reject() -> None:
    reject = only(PPO(), answered("  "))
    assert isinstance(reject, Reject)
    assert reject.reason == "empty answer"


# Options.


@pytest.mark.parametrize("changed", [{"temperature": 0.7}, {"top_p": 0.9}, {"stop": ["."]}])
def test_answers_that_are_not_drawn_from_the_policy_itself_are_refused(
    changed: dict[str, Any],
) -> None:
    with pytest.raises(ValidationError, match=r"leave method\.sampling at temperature 1"):
        PPO.model_validate({"sampling": changed})
    assert PPO.model_validate({"sampling": {"max_new_tokens": 9}}).sampling.temperature == 1


@pytest.mark.parametrize("changed", [{"generator": "frozen"}, {"reference": "round_start"}])
def test_another_generator_or_reference_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="ppo needs"):
        PPO.model_validate(changed)


def test_the_previous_rounds_answers_are_refused_before_the_run() -> None:
    values = {
        "name": "run",
        "method": {"name": "ppo"},
        "judge": {"name": "similarity"},
        "loop": {"mix_previous": True, "prompts_per_round": 8},
    }
    with pytest.raises(RecipeError, match=r"loop\.mix_previous adds answers of an earlier policy"):
        check_recipe(Recipe.model_validate(values))


# Targets.


def test_a_round_of_two_answers_is_the_hand_calculation() -> None:
    """kl_coef 0.5, one nat apart: rewards (−0.5, −0.5 + 3) and (−0.5 − 1); values 0, γ = 1, λ = 0.5.

    A = (−0.5 + 0.5·2.5, 2.5) = (0.75, 2.5) and (−1.5); returns are the same, since the values are 0.
    """
    method = PLAIN.model_copy(update={"kl_coef": 0.5, "lam": 0.5})
    targets, _ = method.targets(rollout([3.0, -1.0], apart=1.0), method.first_memory())
    assert targets.advantages_NT.tolist() == [[0.75, 2.5], [-1.5, 0.0]]
    assert targets.returns_NT.tolist() == [[0.75, 2.5], [-1.5, 0.0]]
    assert targets.facts == {"explained_variance": pytest.approx(0), "kl_coef": 0.5}


def test_returns_are_not_whitened_and_advantages_are() -> None:
    method = PLAIN.model_copy(update={"whiten": True})
    targets, _ = method.targets(rollout([3.0, -1.0]), method.first_memory())
    plain, _ = PLAIN.targets(rollout([3.0, -1.0]), method.first_memory())
    white = targets.advantages_NT[rollout([0, 0]).mask_NT]
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(targets.returns_NT, plain.returns_NT)


def test_scores_are_normalised_by_all_rounds_and_then_clipped() -> None:
    """Seen: 0, 0 and then 0, 8: mean 2, deviation √12, so 8 is worth 6/√12 = 1.73, clipped to 1.5."""
    method = PPO(whiten=False, kl_coef=0.0, reward_clip=1.5)
    _, memory = method.targets(rollout([0.0, 0.0]), method.first_memory())
    assert memory.count == 2
    targets, memory = method.targets(rollout([0.0, 8.0]), memory)
    assert (memory.count, memory.mean) == (4, 2)
    assert targets.returns_NT[1, 0].item() == pytest.approx(1.5)
    assert targets.returns_NT[0, 1].item() == pytest.approx(-2 / 12**0.5)


def test_the_coefficient_stays_or_follows_the_divergence_from_round_to_round() -> None:
    """1.5 nats an answer in the mean against a target of 3: −20 %, by 2 answers of a horizon of 10."""
    fixed, adaptive = (
        PLAIN.model_copy(
            update={"kl_control": kind, "kl_target": 3.0, "kl_horizon": 10.0, "kl_coef": 0.5}
        )
        for kind in ("fixed", "adaptive")
    )
    for method, expected in ((fixed, 0.5), (adaptive, 0.5 * (1 - 0.2 * 2 / 10))):
        targets, memory = method.targets(rollout([3.0, -1.0], apart=1.0), method.first_memory())
        assert targets.facts["kl_coef"] == 0.5
        assert memory.kl_coef == pytest.approx(expected)


# The loss.


def test_the_loss_weighs_policy_and_value_and_every_token_the_same() -> None:
    """Ratio 1, advantages 2, −1 and 5; values 1 off: (−2 + 1)/1.5 and −5/1.5, plus 0.3 times ½ a token over 1.5."""
    method = PLAIN.model_copy(update={"value_coef": 0.3, "value_clip": None})
    given = rollout([0.0, 0.0])
    tokens = ppo.TokenLogps(
        policy_BT=given.logps_NT,
        values_BT=torch.ones(2, 2),
        old_policy_BT=given.logps_NT,
        old_values_BT=torch.ones(2, 2),
        reference_BT=given.reference_NT,
        advantages_BT=torch.tensor([[2.0, -1.0], [5.0, 0.0]]),
        returns_BT=torch.zeros(2, 2),
        mask_BT=given.mask_NT,
        scores_B=given.scores_N,
        mean_length=1.5,
    )
    output = method.token_loss(tokens, 0.0)
    assert output.metrics["policy_loss"].tolist() == pytest.approx([-1 / 1.5, -5 / 1.5])
    assert output.metrics["value_loss"].tolist() == pytest.approx([1 / 1.5, 0.5 / 1.5])
    assert output.loss_B.tolist() == pytest.approx([-0.7 / 1.5, -4.85 / 1.5])
