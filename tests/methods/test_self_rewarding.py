"""Self-rewarding: several answers, the policy's own judgement, best over worst."""

import random
from collections.abc import Sequence

import pytest
import torch

from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges.self_judge import SelfJudge, expected_rating
from prefloop.methods import Actors
from prefloop.methods.dpo import DPO
from prefloop.methods.self_rewarding import SelfRewarding
from prefloop.records import Candidates, Message, Pair, Prompt, Request, derive_seed
from prefloop.train.losses import GroupLogps

PROMPTS = [
    Prompt(id=f"p{n}", messages=(Message(role="user", content=f"Question {n}?"),)) for n in range(3)
]


class Rater(FakeEngine):
    """Rates what it is shown by a draw from the words, and keeps the questions."""

    def __init__(self) -> None:
        super().__init__()
        self.questions: list[str] = []

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        self.questions += [request.messages[-1].content for request in requests]
        return super().choose(requests, options)


def test_the_policy_rates_its_own_answers_and_learns_the_best_over_the_worst() -> None:
    engine = Rater()
    judge = SelfJudge().open(engine, PromptSet("compact"))
    actors = Actors(engine, judge, PromptSet("compact"), 1, 7)
    method = SelfRewarding(candidates=5)
    groups = [g for g in method.generate(PROMPTS, actors) if isinstance(g, Candidates)]
    assert all(len({r.text for r in group.responses.values()}) == 5 for group in groups)
    ranked = [g for g in method.rank(groups, actors) if isinstance(g, Candidates)]
    assert len(engine.questions) == 15

    def rating(question: str) -> float:
        draw = random.Random(derive_seed(question))
        weights = [draw.random() + 0.01 for _ in range(5)]
        return expected_rating([weight / sum(weights) for weight in weights])

    for place, (group, pair) in enumerate(zip(ranked, method.pair(ranked, 1), strict=True)):
        assert isinstance(pair, Pair)
        shown = engine.questions[5 * place : 5 * place + 5]
        texts = [response.text for response in group.responses.values()]
        assert all(text in question for text, question in zip(texts, shown, strict=True))
        by_rating = sorted(zip(map(rating, shown), texts, strict=True))
        assert (pair.rejected, pair.chosen) == (by_rating[0][1], by_rating[-1][1])


def test_its_measures_by_hand() -> None:
    groups = [
        Candidates(prompt=prompt, responses={}, scores=dict(zip("abc", scores, strict=True)))
        for prompt, scores in zip(PROMPTS, [(1, 2, 6), (4, 4, 4)], strict=False)
    ]
    assert SelfRewarding().measures(groups) == pytest.approx(
        {"score_best": 5.0, "score_mean": 3.5, "score_worst": 2.5}
    )


def test_its_loss_is_dpos() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = [{r: -30 * torch.rand(5, generator=generator) for r in DPO.roles} for _ in range(2)]
    given = GroupLogps(draw[0], draw[1], dict.fromkeys(DPO.roles, torch.ones(5)), torch.zeros(5))
    expected = DPO(beta=0.2).loss(given, 0.0).loss_B
    assert torch.equal(SelfRewarding(beta=0.2).loss(given, 0.0).loss_B, expected)
