"""A language model as judge, the policy or another, read from next-token probabilities, never from sampled text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, permutations
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from prefloop.errors import JudgeError
from prefloop.generate.engine import MIN_MASS, among
from prefloop.judges import ALONE, EMPTY, Judge, NoVerdict, OpenJudge, Verdict, finite
from prefloop.records import Message, Prompt, Request

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial

RATINGS = ("1", "2", "3", "4", "5")
SIDES = ("A", "B")
SIDES_OR_TIE = ("A", "B", "C")
MARK_LENGTH = 6
NO_RATING = NoVerdict("would not say a rating")


class SelfJudge(Judge):
    """A model rates each answer 1 to 5, or compares answers two by two in both orders; the policy by default.

    LLM-as-a-judge in the self-rewarding setting (Yuan et al. 2024, arXiv:2401.10020); the expectation
    over rating tokens is G-Eval's (Liu et al. 2023, arXiv:2303.16634, section 2); asking in both orders
    against position bias is Zheng et al. 2023 (arXiv:2306.05685, section 3.4).
    """

    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """pointwise: expected rating, 1 to 5. pairwise: mean probability of winning, 0 to 1."""
    criterion: str | None = None
    """What to judge by ("honesty"); without it, overall quality."""
    ties: bool = False
    """pairwise: offer "equally good" as a third choice; it counts as half a win."""
    min_mass: float = Field(default=MIN_MASS, ge=0.0, le=1.0)
    """No verdict where the model gives all ratings together less than this probability: it would say something
    else, and how it divides the rest says nothing. 0 takes every answer."""
    model: str | None = None
    """Folder, Hub id or embedded:NAME of a causal language model that judges instead of the policy."""

    @model_validator(mode="after")
    def _ties_are_between_two(self) -> SelfJudge:
        if self.ties and self.mode != "pairwise":
            raise ValueError("judge.ties needs judge.mode pairwise; set that, or leave ties out")
        return self

    @property
    def needs_policy(self) -> bool:
        """Unless another model judges."""
        return self.model is None

    @property
    def sources(self) -> dict[str, str]:
        """The other model."""
        return {} if self.model is None else {"model": self.model}

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """JudgeError where there is no policy to ask and no other model is named."""
        if self.model is not None:
            from prefloop.generate.hf_engine import open_engine

            policy = open_engine(self.model)
        if policy is None:
            raise JudgeError(
                "judge 'self_judge' asks the policy, but no policy is loaded here; "
                "name a model in judge.model, or choose another judge"
            )
        asked = question(self.mode, prompts, self.criterion, self.ties)
        return _OpenSelfJudge(policy, asked, self.min_mass)


@dataclass(frozen=True)
class Question:
    """A way of asking: the conversations for one group, and the scores that their rows of probabilities mean."""

    templates: PromptSet
    criterion: str | None
    options: tuple[str, ...]
    """The words that a verdict is made of."""

    smallest: ClassVar[int]
    """Fewest answers that the question makes sense for."""

    def ask(self, prompt: Prompt, group: Sequence[str]) -> list[tuple[Message, ...]]:
        """The conversations that ask about one group, each to be answered by one of `options`."""
        raise NotImplementedError

    def read(self, rows: Sequence[Sequence[float]], size: int) -> tuple[float, ...]:
        """Scores of a group of `size` from the probabilities of `options`, one row a conversation."""
        raise NotImplementedError

    def refusal(self, group: Sequence[str]) -> NoVerdict | None:
        """Why this group cannot be asked about, if it cannot."""
        if not all(text.strip() for text in group):
            return EMPTY
        return ALONE if len(group) < self.smallest else None

    def _render(self, role: str, prompt: Prompt, **answers: str) -> tuple[Message, ...]:
        asked = transcript(prompt.messages)
        return self.templates.render(
            role,
            question=asked,
            criterion=self.criterion,
            fence=fence(asked, *answers.values()),
            ties=len(self.options) == len(SIDES_OR_TIE),
            **answers,
        )


class _Pointwise(Question):
    smallest = 1

    def ask(self, prompt: Prompt, group: Sequence[str]) -> list[tuple[Message, ...]]:
        return [self._render("judge", prompt, answer=text) for text in group]

    def read(self, rows: Sequence[Sequence[float]], size: int) -> tuple[float, ...]:
        return tuple(expected_rating(row) for row in rows)


class _Pairwise(Question):
    smallest = 2

    def ask(self, prompt: Prompt, group: Sequence[str]) -> list[tuple[Message, ...]]:
        return [
            self._render("judge_pair", prompt, answer_a=group[first], answer_b=group[second])
            for first, second in permutations(range(len(group)), 2)
        ]

    def read(self, rows: Sequence[Sequence[float]], size: int) -> tuple[float, ...]:
        return win_probabilities([row[0] + sum(row[2:]) / 2 for row in rows], size)


def question(
    mode: Literal["pointwise", "pairwise"], templates: PromptSet, criterion: str | None, ties: bool
) -> Question:
    """The way of asking that a judge's options mean."""
    if mode == "pointwise":
        return _Pointwise(templates, criterion, RATINGS)
    return _Pairwise(templates, criterion, SIDES_OR_TIE if ties else SIDES)


@dataclass(frozen=True)
class _OpenSelfJudge:
    engine: Engine
    question: Question
    min_mass: float

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        refusals = [self.question.refusal(group) for group in groups]
        asked = [
            [] if refusal else self.question.ask(prompt, group)
            for prompt, group, refusal in zip(prompts, groups, refusals, strict=True)
        ]
        requests = [Request(messages=messages) for group in asked for messages in group]
        rows = iter(self.engine.choose(requests, self.question.options) if requests else ())
        return [
            refusal or self._read([next(rows) for _ in questions], len(group))
            for group, refusal, questions in zip(groups, refusals, asked, strict=True)
        ]

    def _read(self, rows: Sequence[Sequence[float]], size: int) -> Verdict:
        known = [shares for row in rows if (shares := among(row, self.min_mass)) is not None]
        return finite(self.question.read(known, size)) if len(known) == len(rows) else NO_RATING


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


def fence(*texts: str) -> str:
    """A mark that stands in none of the texts, for tags around them: none of them can close its own.

    It is made from the texts, so the same question is always asked in the same words.
    """
    for attempt in count():
        mark = sha256("\0".join([str(attempt), *texts]).encode("utf-8", "replace")).hexdigest()[
            :MARK_LENGTH
        ]
        if not any(mark in text for text in texts):
            return mark
    raise AssertionError("count() never ends")


def transcript(messages: Sequence[Message]) -> str:
    """The question as the judge reads it: a lone turn as it is, a conversation with its speakers."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)
