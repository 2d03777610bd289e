"""The policy as its own judge, read from next-token probabilities, never from sampled text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, ClassVar, Literal

from prefloop.errors import JudgeError
from prefloop.rank import Judge, NoVerdict, OpenJudge, Verdict
from prefloop.records import Message, Prompt, Request

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet

RATINGS = ("1", "2", "3", "4", "5")
SIDES = ("A", "B")


class SelfJudge(Judge):
    """The policy rates each answer 1 to 5, or compares answers two by two in both orders.

    LLM-as-a-judge in the self-rewarding setting (Yuan et al. 2024, arXiv:2401.10020); the expectation
    over rating tokens is G-Eval's (Liu et al. 2023, arXiv:2303.16634, section 2); asking in both orders
    against position bias is Zheng et al. 2023 (arXiv:2306.05685, section 3.4).
    """

    needs_policy: ClassVar[bool] = True

    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """pointwise: expected rating, 1 to 5. pairwise: mean probability of winning, 0 to 1."""
    criterion: str | None = None
    """What to judge by ("honesty"); without it, overall quality."""

    def open(self, policy: Engine | None, prompts: PromptSet) -> OpenJudge:
        """JudgeError where there is no policy to ask."""
        if policy is None:
            raise JudgeError(
                "judge 'self_judge' asks the policy, but no policy is loaded here; "
                "give one, or choose another judge in the recipe"
            )
        return _OpenSelfJudge(policy, QUESTIONS[self.mode](prompts, self.criterion))


@dataclass(frozen=True)
class _Question:
    """A way of asking: the requests for one group, and the scores that their rows of probabilities mean."""

    templates: PromptSet
    criterion: str | None

    options: ClassVar[tuple[str, ...]]
    smallest: ClassVar[int]
    """Fewest answers that the question makes sense for."""

    def ask(self, prompt: Prompt, group: Sequence[str]) -> list[Request]:
        raise NotImplementedError

    def read(self, rows: Sequence[Sequence[float]], size: int) -> tuple[float, ...]:
        raise NotImplementedError

    def request(self, role: str, prompt: Prompt, **answers: str) -> Request:
        question = _transcript(prompt.messages)
        return Request(
            messages=self.templates.render(
                role, question=question, criterion=self.criterion, **answers
            )
        )


class _Pointwise(_Question):
    options = RATINGS
    smallest = 1

    def ask(self, prompt: Prompt, group: Sequence[str]) -> list[Request]:
        return [self.request("judge", prompt, answer=text) for text in group]

    def read(self, rows: Sequence[Sequence[float]], size: int) -> tuple[float, ...]:
        return tuple(expected_rating(row) for row in rows)


class _Pairwise(_Question):
    options = SIDES
    smallest = 2

    def ask(self, prompt: Prompt, group: Sequence[str]) -> list[Request]:
        return [
            self.request("judge_pair", prompt, answer_a=group[first], answer_b=group[second])
            for first, second in permutations(range(len(group)), 2)
        ]

    def read(self, rows: Sequence[Sequence[float]], size: int) -> tuple[float, ...]:
        return win_probabilities([row[0] for row in rows], size)


QUESTIONS: dict[str, type[_Question]] = {"pointwise": _Pointwise, "pairwise": _Pairwise}


@dataclass(frozen=True)
class _OpenSelfJudge:
    policy: Engine
    question: _Question

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        refusals = [self._refusal(group) for group in groups]
        asked = [
            [] if refusal else self.question.ask(prompt, group)
            for prompt, group, refusal in zip(prompts, groups, refusals, strict=True)
        ]
        requests = [request for group in asked for request in group]
        rows = iter(self.policy.choose(requests, self.question.options) if requests else ())
        return [
            refusal or self._verdict([next(rows) for _ in requests], len(group))
            for group, refusal, requests in zip(groups, refusals, asked, strict=True)
        ]

    def _refusal(self, group: Sequence[str]) -> NoVerdict | None:
        if not all(text.strip() for text in group):
            return NoVerdict("empty response")
        if len(group) < self.question.smallest:
            return NoVerdict("nothing to compare with")
        return None

    def _verdict(self, rows: Sequence[Sequence[float]], size: int) -> Verdict:
        scores = self.question.read(rows, size)
        if not all(map(math.isfinite, scores)):
            return NoVerdict("score is not finite")
        return scores


def expected_rating(probabilities: Sequence[float]) -> float:
    """Mean of the rating tokens "1" ... "5" under their five probabilities."""
    return math.fsum(int(rating) * p for rating, p in zip(RATINGS, probabilities, strict=True))


def win_probabilities(first_wins: Sequence[float], size: int) -> tuple[float, ...]:
    """Each answer's probability of winning, averaged over its opponents and over both orders.

    `first_wins` holds, for every ordered pair of `size` answers in the order of
    `itertools.permutations(range(size), 2)`, the probability that the one shown first is better.
    The scores of a group add up to size / 2, whatever the judge's position bias.
    """
    shares: list[list[float]] = [[] for _ in range(size)]
    for (first, second), p in zip(permutations(range(size), 2), first_wins, strict=True):
        shares[first].append(p)
        shares[second].append(1.0 - p)
    return tuple(math.fsum(share) / len(share) for share in shares)


def _transcript(messages: Sequence[Message]) -> str:
    """The question as the judge reads it: a lone turn as it is, a conversation with its speakers."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)
