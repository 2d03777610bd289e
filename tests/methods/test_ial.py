"""IAL: who is asked what, who wins, what is trained on, and which loss is chosen."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict, Verdict
from prefloop.methods import Actors
from prefloop.methods._gates import Gates
from prefloop.methods.ial import IAL
from prefloop.records import Candidates, Message, Pair, Prompt, Reject, Request, Response, Sampling
from prefloop.train import losses
from prefloop.train.losses import GroupLogps

PROMPTS = [
    Prompt(id=f"p{n}", messages=(Message(role="user", content=f"Question {n}?"),), target=f"T{n}")
    for n in range(4)
]


class Recorder(FakeEngine):
    """Keeps what it was asked: label, sampling and the requests' last turns."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, Sampling, list[str]]] = []

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = ""
    ) -> list[Response]:
        self.asked.append((label, sampling, [r.messages[-1].content for r in requests]))
        return super().sample(requests, sampling, seed=seed, label=label)


class FakeJudge:
    """Gives each group the verdict that stands in a list."""

    def __init__(self, verdicts: list[Verdict]) -> None:
        self.verdicts = verdicts
        self.groups: list[Sequence[str]] = []

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        self.groups += groups
        return self.verdicts[: len(groups)]


def actors(engine: Any = None, judge: Any = None, seed: int = 7) -> Actors:
    return Actors(engine or FakeEngine(), judge, PromptSet("compact"), 0, seed)


def group(draft: str, rewrite: str, scores: tuple[float, float] = (0.0, 0.0)) -> Candidates:
    return Candidates(
        prompt=PROMPTS[0],
        responses={"draft": Response(text=draft), "rewrite": Response(text=rewrite)},
        scores={"draft": scores[0], "rewrite": scores[1]},
    )


def only(method: IAL, candidates: Candidates) -> Pair | Reject:
    [result] = method.pair([candidates], round=3)
    return result


# Generation.


def test_in_turns_advice_and_rewrite_go_on_with_the_conversation() -> None:
    conversations: dict[str, list[Request]] = {}

    class Listener(FakeEngine):
        def sample(
            self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = ""
        ) -> list[Response]:
            conversations[label] = list(requests)
            return super().sample(requests, sampling, seed=seed, label=label)

    found = list(IAL(layout="turns").generate(PROMPTS, actors(Listener())))
    for n, candidates in enumerate(found):
        assert isinstance(candidates, Candidates)
        said = candidates.responses
        advice = conversations["advisor"][n].messages
        rewrite = conversations["player again"][n].messages
        assert advice[:1] == PROMPTS[n].messages
        assert advice[1] == Message(role="assistant", content=said["draft"].text)
        assert rewrite[:3] == advice
        assert rewrite[3] == Message(role="assistant", content=said["advice"].text)
        assert [m.role for m in rewrite] == ["user", "assistant", "user", "assistant", "user"]
        assert said["draft"].text not in advice[2].content


def test_the_advisor_sees_the_draft_and_the_player_sees_the_advice() -> None:
    engine = Recorder()
    method = IAL(sampling=Sampling(max_new_tokens=9), advice=Sampling(max_new_tokens=4))
    found = list(method.generate(PROMPTS, actors(engine)))
    (_, _, asks), (_, advice_sampling, advisor), (_, rewrite_sampling, rewriter) = engine.asked
    assert asks == [prompt.text for prompt in PROMPTS]
    assert (advice_sampling, rewrite_sampling) == (method.advice, method.sampling)
    for n, candidates in enumerate(found):
        assert isinstance(candidates, Candidates)
        assert candidates.prompt == PROMPTS[n]
        assert list(candidates.responses) == ["draft", "advice", "rewrite"]
        texts = {name: response.text for name, response in candidates.responses.items()}
        assert len(set(texts.values())) == 3
        for shown in (PROMPTS[n].text, texts["draft"]):
            assert shown in advisor[n]
            assert shown in rewriter[n]
        assert texts["advice"] in rewriter[n]


def test_without_an_advisor_the_second_answer_is_a_second_draft() -> None:
    engine = Recorder()
    found = list(IAL(advisor=False).generate(PROMPTS, actors(engine)))
    assert [texts for _, _, texts in engine.asked] == [[p.text for p in PROMPTS]] * 2
    for candidates in found:
        assert isinstance(candidates, Candidates)
        draft, second = candidates.responses["draft"], candidates.responses["rewrite"]
        assert draft.text != second.text


def test_copy_draft_asks_once_and_makes_both_answers_equal() -> None:
    engine = Recorder()
    [candidates] = IAL(copy_draft=True).generate(PROMPTS[:1], actors(engine))
    assert isinstance(candidates, Candidates)
    assert candidates.responses["rewrite"] == candidates.responses["draft"]
    assert len(engine.asked) == 1


def test_a_chunk_depends_on_its_seed_and_on_nothing_played_before() -> None:
    method, engine = IAL(), FakeEngine()
    first = list(method.generate(PROMPTS[:2], actors(engine, seed=1)))
    after = list(method.generate(PROMPTS[2:], actors(engine, seed=2)))
    assert after == list(IAL().generate(PROMPTS[2:], actors(seed=2)))
    assert first == list(IAL().generate(PROMPTS[:2], actors(seed=1)))
    assert first != list(IAL().generate(PROMPTS[:2], actors(seed=2)))


# Ranking.


def test_the_judge_scores_draft_and_rewrite_in_this_order() -> None:
    judge = FakeJudge([(1.0, 2.0), (4.0, 3.0)])
    ranked = list(IAL().rank([group("a", "b"), group("c", "d")], actors(judge=judge)))
    assert judge.groups == [("a", "b"), ("c", "d")]
    assert [r.scores for r in ranked if isinstance(r, Candidates)] == [
        {"draft": 1.0, "rewrite": 2.0},
        {"draft": 4.0, "rewrite": 3.0},
    ]


def test_no_verdict_is_a_reject_and_no_score() -> None:
    judge = FakeJudge([(1.0, 2.0), NoVerdict("too long")])
    ranked = list(IAL().rank([group("a", "b"), group("c", "d")], actors(judge=judge)))
    assert ranked[1] == Reject(prompt_id="p0", stage="rank", reason="no verdict", detail="too long")


# Pairs.


@pytest.mark.parametrize(
    ("scores", "winner", "loser"),
    [
        ((2.0, 1.0), "draft", "rewrite"),
        ((1.0, 2.0), "rewrite", "draft"),
        ((1.0, 1.0), "rewrite", "draft"),
    ],
    ids=["draft above", "rewrite above", "tie"],
)
def test_the_draft_wins_only_above_the_rewrite(
    scores: tuple[float, float], winner: str, loser: str
) -> None:
    """Eq. 5: y+ is the draft if r(y) > r(y'), else the rewrite."""
    pair = only(IAL(), group("draft", "rewrite", scores))
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected) == (winner, loser)
    assert pair.origin == {"chosen": winner, "rejected": loser}
    assert pair.scores == {"chosen": max(scores), "rejected": min(scores)}
    assert (pair.target, pair.prompt, pair.id) == ("T0", PROMPTS[0].messages, "0003/p0")
    assert pair.margin == 0


def test_identical_answers_are_trained_on_by_default() -> None:
    pair = only(IAL(), group("same  words", "same words\n", (1, 1)))
    assert isinstance(pair, Pair)


def test_one_gate_changes_and_the_methods_others_stay() -> None:
    gates = IAL.model_validate({"gates": {"cut_off": False}}).gates
    assert gates == IAL().gates.model_copy(update={"cut_off": False})
    assert gates.meta_talk is False, "the class Gates has it on; IAL has it off"


@pytest.mark.parametrize(
    ("gates", "draft", "rewrite", "reason"),
    [
        ({}, "", "rewritten", "empty answer"),
        ({"meta_talk": True}, "Paris.", "Here is the improved answer: Paris.", "meta talk"),
        ({"identical": True}, "Paris.", "Paris.", "identical"),
        ({"max_edit_share": 0.5}, "one two", "three four", "edit share"),
    ],
)
def test_gates_reject_with_reason_and_both_texts(
    gates: dict[str, Any], draft: str, rewrite: str, reason: str
) -> None:
    method = IAL.model_validate({"gates": gates})
    reject = only(method, group(draft, rewrite))
    assert isinstance(reject, Reject)
    assert (reject.prompt_id, reject.stage, reject.reason) == ("p0", "pair", reason)
    assert repr(draft) in reject.detail
    assert repr(rewrite) in reject.detail


def test_a_pair_says_which_of_its_answers_were_cut_off() -> None:
    whole = group("draft", "rewrite", (2.0, 1.0))
    cut = whole.responses["draft"].model_copy(update={"finish": "length"})
    candidates = whole.model_copy(update={"responses": {**whole.responses, "draft": cut}})
    assert only(IAL(), candidates).reason == "cut off"  # type: ignore[union-attr]
    taken = IAL.model_validate({"gates": {"cut_off": False}})
    assert only(taken, candidates).unfinished == ("chosen",)  # type: ignore[union-attr]
    assert only(taken, whole).unfinished == ()  # type: ignore[union-attr]


def test_an_option_of_the_gates_leaves_the_others_as_the_method_has_them() -> None:
    assert IAL.model_validate({"gates": {"cut_off": False}}).gates == Gates(
        cut_off=False, identical=False, meta_talk=False
    )
    assert IAL.model_validate({"advice": {"temperature": 0.2}}).advice.max_new_tokens == 128


# Loss.


def logps(count: int = 5, equal: bool = False, seed: int = 0) -> GroupLogps:
    generator = torch.Generator().manual_seed(seed)
    roles = IAL.roles

    def draw() -> dict[str, torch.Tensor]:
        return {r: 40 * torch.randn(count, generator=generator, dtype=torch.float64) for r in roles}

    policy = draw()
    return GroupLogps(
        policy=policy,
        reference=policy if equal else draw(),
        lengths={role: torch.arange(1, count + 1) for role in roles},
        margin_B=torch.zeros(count, dtype=torch.float64),
    )


FUNCTIONS = {
    "smoothed": losses.spacp,
    "linear": losses.spacp_linear,
    "printed": losses.spacp_printed,
}


@pytest.mark.parametrize("objective", FUNCTIONS)
def test_the_objective_chooses_the_loss(objective: Any) -> None:
    given = logps()
    expected = FUNCTIONS[objective](
        *(given.ratio(role) for role in ("target", "chosen", "rejected")),
        eta=0.3,
        gamma=2.0,
        lam=0.5,
    )
    method = IAL(objective=objective, eta=0.3, gamma=2.0, lam=0.5)
    torch.testing.assert_close(method.loss(given, 0.0).loss_B, expected)


@pytest.mark.parametrize("objective", FUNCTIONS)
def test_the_nll_penalty_stands_outside_and_takes_the_other_one_away(objective: Any) -> None:
    given = logps()
    inside = IAL(objective=objective, gamma=0.0).loss(given, 0.0).loss_B
    nll = -given.policy["target"] / given.lengths["target"]
    found = IAL(objective=objective, gamma=2.0, penalty="nll").loss(given, 0.0).loss_B
    torch.testing.assert_close(found, inside + 2.0 * nll)


@pytest.mark.parametrize("objective", FUNCTIONS)
@pytest.mark.parametrize("lam", [0.0, 1.0, 2.5])
def test_loss_at_start_is_the_loss_at_equal_policies(objective: Any, lam: float) -> None:
    method = IAL(objective=objective, lam=lam)
    pair = Pair(prompt_id="p", round=0, prompt=PROMPTS[0].messages, chosen="a", rejected="b")
    known = method.loss_at_start([pair] * 5)
    assert known is not None
    assert method.loss(logps(equal=True), 0.0).loss_B.mean().item() == pytest.approx(known)


def test_loss_at_start_is_two_log_two_by_default_and_unknown_with_nll() -> None:
    assert IAL().loss_at_start([]) == pytest.approx(2 * math.log(2))
    assert IAL(penalty="nll").loss_at_start([]) is None


def test_metrics_are_the_papers_and_carry_no_gradient() -> None:
    """r = 2, 1, -3 for target, better, worse: Margin 2 - (1 - 3)/2 = 3, Real Reward 0.1 * 2."""
    policy = {
        role: torch.tensor([value], requires_grad=True)
        for role, value in {"target": -8.0, "chosen": -9.0, "rejected": -13.0}.items()
    }
    given = GroupLogps(
        policy=policy,
        reference={role: torch.tensor([-10.0]) for role in policy},
        lengths={role: torch.tensor([4.0]) for role in policy},
        margin_B=torch.zeros(1),
    )
    output = IAL().loss(given, 0.0)
    found = {name: value.item() for name, value in output.metrics.items()}
    assert found == pytest.approx(
        {
            "margin": 3.0,
            "real_reward": 0.2,
            "penalty": 0.0,
            "reward_chosen": 0.1,
            "reward_rejected": -0.3,
            "accuracy": 1.0,
        }
    )
    assert output.loss_B.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())


# Measures.


def test_measures_are_shares_counted_by_hand() -> None:
    """Of four: two rewrites score above, one ties; one pair is identical but for spaces."""
    ranked = [
        group("a", "b", (1, 2)),
        group("a", "c", (1, 5)),
        group("a", "d", (3, 2)),
        group("a b", "a  b", (1, 1)),
    ]
    assert IAL().measures(ranked) == {
        "R_i": 2 / 4,
        "identical_rate": 1 / 4,
        "score_rewrite": (2 + 5 + 2 + 1) / 4,
    }
    assert IAL().measures([]) == {}
