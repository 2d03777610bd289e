"""DPO, IPO, DPOP and SFT: where their examples come from, and their losses' values."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict, Verdict
from prefloop.methods import Actors, Method
from prefloop.methods._gates import Gates
from prefloop.methods._pair_method import best_over_worst, drafts
from prefloop.methods.dpo import DPO
from prefloop.methods.dpop import DPOP
from prefloop.methods.ipo import IPO
from prefloop.methods.sft import SFT
from prefloop.records import Candidates, Message, Pair, Prompt, Reject, Response, Sampling
from prefloop.train.losses import GroupLogps

PLAIN = Prompt(id="p", messages=(Message(role="user", content="Question?"),), target="T")
LABELLED = PLAIN.model_copy(update={"chosen": "good", "rejected": "bad"})


class Judge:
    """Gives every group the same verdict."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return [self.verdict] * len(groups)


def actors(judge: Any = None) -> Actors:
    return Actors(FakeEngine(), judge, PromptSet("compact"), 0, 7)


def only(method: Method, prompt: Prompt, judge: Any = None) -> Pair | Reject:
    """What one prompt gives, through the method's three stages."""
    [found] = method.generate([prompt], actors(judge))
    if isinstance(found, Candidates):
        [found] = method.rank([found], actors(judge))
    if isinstance(found, Reject):
        return found
    [result] = method.pair([found], round=2)
    return result


def group(**texts: str) -> Candidates:
    return Candidates(
        prompt=PLAIN, responses={name: Response(text=text) for name, text in texts.items()}
    )


def logps(chosen: float, rejected: float, lengths: tuple[int, int] = (1, 1)) -> GroupLogps:
    """Log-ratios against a reference that gives everything -10."""
    return GroupLogps(
        policy={"chosen": torch.tensor([chosen - 10]), "rejected": torch.tensor([rejected - 10])},
        reference={role: torch.tensor([-10.0]) for role in ("chosen", "rejected")},
        lengths={"chosen": torch.tensor([lengths[0]]), "rejected": torch.tensor([lengths[1]])},
        margin_B=torch.zeros(1),
    )


# Pairs.


def test_a_labelled_pair_passes_as_it_stands() -> None:
    pair = only(DPO(), LABELLED)
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected, pair.target, pair.round) == ("good", "bad", "T", 2)
    assert pair.origin == {"chosen": "chosen", "rejected": "rejected"}
    assert (pair.scores, pair.unfinished) == ({}, ())


def test_a_prompt_without_labels_is_a_reject() -> None:
    assert only(DPO(), PLAIN) == Reject(
        prompt_id="p", stage="generate", reason="no labelled pair", detail=""
    )


@pytest.mark.parametrize(("verdict", "better"), [((2.0, 1.0), 0), ((1.0, 2.0), 1)])
def test_the_judge_says_which_draft_is_chosen(verdict: Verdict, better: int) -> None:
    pair = only(DPO(pairs="drafts"), PLAIN, Judge(verdict))
    assert isinstance(pair, Pair)
    assert pair.origin == {"chosen": f"draft_{better}", "rejected": f"draft_{1 - better}"}
    assert pair.scores == {"chosen": 2.0, "rejected": 1.0}
    assert pair.chosen != pair.rejected


def test_a_tie_and_no_verdict_are_rejects() -> None:
    tie = only(DPO(pairs="drafts"), PLAIN, Judge((1.0, 1.0)))
    assert isinstance(tie, Reject)
    assert (tie.stage, tie.reason) == ("pair", "tie")
    none = only(DPO(pairs="drafts"), PLAIN, Judge(NoVerdict("too long")))
    assert none == Reject(prompt_id="p", stage="rank", reason="no verdict", detail="too long")


def test_what_is_asked_for_depends_on_where_the_pairs_come_from() -> None:
    assert (DPO().needs_pairs, DPO().needs_judge) == (True, False)
    assert (DPO(pairs="drafts").needs_pairs, DPO(pairs="drafts").needs_judge) == (False, True)


def test_best_over_worst_of_many_passes_over_the_middle_and_through_the_gates() -> None:
    ranked = group(a="one", b="two", c="three").model_copy(
        update={"scores": {"a": 0.5, "b": 0.9, "c": 0.1}}
    )
    pair = best_over_worst(ranked, Gates(), 0)
    assert isinstance(pair, Pair)
    assert pair.origin == {"chosen": "b", "rejected": "c"}
    reject = best_over_worst(ranked, Gates(max_length_ratio=1.5), 0)
    assert isinstance(reject, Reject)
    assert reject.reason == "length ratio"


def test_every_prompt_gets_drafts_of_its_own() -> None:
    prompts = [PLAIN, PLAIN.model_copy(update={"id": "q"})]
    found = list(drafts(prompts, actors(), Sampling(), 3))
    assert [candidates.prompt.id for candidates in found] == ["p", "q"]
    assert all(list(c.responses) == ["draft_0", "draft_1", "draft_2"] for c in found)
    texts = [response.text for c in found for response in c.responses.values()]
    assert len(set(texts)) == 6


def test_sft_learns_the_target_and_prefers_it_to_nothing() -> None:
    pair = only(SFT(), PLAIN)
    assert isinstance(pair, Pair)
    assert (pair.target, pair.chosen, pair.rejected) == ("T", "T", "")
    assert SFT.roles == ("target",)


# Losses.


def test_dpo_by_hand() -> None:
    """r = 3 and -2: -log sigma(0.1 * 5) = log(1 + e^-0.5)."""
    output = DPO().loss(logps(3.0, -2.0), 0.0)
    assert output.loss_B.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert {name: value.item() for name, value in output.metrics.items()} == pytest.approx(
        {
            "reward_margin": 0.5,
            "real_reward": 0.3,
            "reward_chosen": 0.3,
            "reward_rejected": -0.2,
            "accuracy": 1.0,
        }
    )


def test_ipo_by_hand() -> None:
    """r = 3 over 2 tokens, -2 over 4: the gap is 1.5 + 0.5, and 1 / (2 * 0.5) is 1."""
    output = IPO(beta=0.5).loss(logps(3.0, -2.0, (2, 4)), 0.0)
    assert output.loss_B.item() == pytest.approx((2.0 - 1.0) ** 2)
    assert output.metrics["gap"].item() == pytest.approx(2.0)
    assert IPO(beta=0.5).loss_at_start([]) == 1.0


def test_dpop_by_hand() -> None:
    """r = -1 and -3: gap 2, penalty 1, gamma 5: -log sigma(0.1 * (2 - 5)) = log(1 + e^0.3)."""
    output = DPOP().loss(logps(-1.0, -3.0), 0.0)
    assert output.loss_B.item() == pytest.approx(math.log(1 + math.exp(0.3)))
    assert output.metrics["penalty"].item() == 1.0
    assert DPOP(gamma=0.0).loss(logps(-1.0, -3.0), 0.0).loss_B.item() == pytest.approx(
        DPO().loss(logps(-1.0, -3.0), 0.0).loss_B.item()
    )


def test_sft_by_hand() -> None:
    """-6 over 3 tokens; the reference, which is not computed, makes no difference."""
    given = GroupLogps(
        policy={"target": torch.tensor([-6.0])},
        reference={"target": torch.tensor([100.0])},
        lengths={"target": torch.tensor([3.0])},
        margin_B=torch.zeros(1),
    )
    output = SFT().loss(given, 0.0)
    assert output.loss_B.item() == 2.0
    assert output.metrics["target_logprob"].item() == -2.0
