"""Held-out prompts answered by a policy and scored by a judge: at a round's end, and in the middle of its training.

What is measured in the middle leaves the weights that are trained, and the random numbers that training draws, as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from prefloop.evaluate.answers import ANSWER
from prefloop.evaluate.curves import CURVE, has_ended_early
from prefloop.evaluate.win_rates import win_rate
from prefloop.generate.engine import Engine
from prefloop.judges import NoVerdict, Verdict
from prefloop.manifest import write_atomically
from prefloop.recipe import Recipe
from prefloop.records import (
    Candidates,
    CurvePoint,
    Message,
    Prompt,
    Request,
    Response,
    Sampling,
    Scored,
    derive_seed,
)
from prefloop.run_folder import RoundDir
from prefloop.train.checkpoint import random_state, set_random_state

HELD_OUT = "held-out"
"""Stands for the round in seeds: the prompts meet the same random numbers after every round, so that rounds compare."""
Sample = Callable[[list[Request], int], list[Response]]
"""Answers to requests, drawn from a seed, by the policy that is measured."""
Score = Callable[[Sequence[Prompt], Sequence[Response]], list[Verdict]]
"""A judge's verdict on each answer."""


def answer_and_score(
    prompts: Sequence[Prompt], sample: Sample, score: Score, seed: int
) -> tuple[list[Candidates], dict[str, int]]:
    """One scored answer a prompt, and how often the judge had no verdict, by its reason."""
    answers = sample([Request(messages=prompt.messages) for prompt in prompts], seed)
    verdicts = score(prompts, answers)
    groups, failures = [], dict[str, int]()
    for prompt, answer, verdict in zip(prompts, answers, verdicts, strict=True):
        if isinstance(verdict, NoVerdict):
            failures[verdict.reason] = failures.get(verdict.reason, 0) + 1
        scores = {} if isinstance(verdict, NoVerdict) else {ANSWER: verdict[0]}
        groups.append(Candidates(prompt=prompt, responses={ANSWER: answer}, scores=scores))
    return groups, failures


class KnownAnswers:
    """An Engine that gives each answer that is known once, and has the policy sample what else it is asked for."""

    def __init__(
        self,
        policy: Engine,
        sampling: Sampling,
        known: Iterable[tuple[tuple[Message, ...], Response]],
    ) -> None:
        """`known`: conversations with the policy's answers to them, drawn with `sampling`."""
        self._policy = policy
        self._sampling = sampling
        self._left: dict[tuple[Message, ...], list[Response]] = {}
        for messages, answer in known:
            self._left.setdefault(messages, []).append(answer)

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """Known answers where they were drawn with the same `sampling`, the others as the policy gives them."""
        found: list[Response | None] = [None] * len(requests)
        for place, request in enumerate(requests if sampling == self._sampling else ()):
            if not request.prefix and (left := self._left.get(request.messages)):
                found[place] = left.pop(0)
        asks = [ask for ask, known in zip(requests, found, strict=True) if known is None]
        new = iter(self._policy.sample(asks, sampling, seed=seed, label=label) if asks else ())
        return [next(new) if known is None else known for known in found]

    def score(
        self,
        requests: Sequence[Request],
        answers: Sequence[Response],
        *,
        top: int = 0,
        at: Sequence[Collection[int]] | None = None,
    ) -> list[Scored]:
        """As the policy does."""
        return self._policy.score(requests, answers, top=top, at=at)

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """As the policy does."""
        return self._policy.choose(requests, options)


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of a run, and how the policy that is being trained is measured on them."""

    prompts: Callable[[], Sequence[Prompt]]
    start: Callable[[], Iterable[Candidates]]
    """The initial policy's answers, scored."""
    sample: Sample
    score: Score
    release: Callable[[], None]
    """Give back the memory that sampling took."""


class TrainingCurve:
    """The win rate every k optimiser steps, on the same prompts and random numbers: called after each step.

    A point that is there is not measured again. A killed training goes on through the same weights, so the
    points that it left are true; a checkpoint is written after its step's point, so none is missing.
    """

    def __init__(
        self,
        recipe: Recipe,
        held_out: HeldOut,
        round_dir: RoundDir,
        first_step: int,
        before: Sequence[CurvePoint] = (),
    ) -> None:
        """`first_step`: optimiser steps of the rounds before; `before`: their points."""
        self._before = before
        self._recipe = recipe
        self._held_out = held_out
        self._round = round_dir.number
        self._first = first_step
        self._every = recipe.evaluate.every_steps
        self._path = round_dir.path / f"{CURVE}.jsonl"
        self._points = round_dir.records(CURVE, CurvePoint) if self._path.exists() else []

    def __call__(self, done: int) -> None:
        """`done` steps of this round are done."""
        step = self._first + done
        if not self._every or step % self._every or any(p.step == step for p in self._points):
            return
        random = random_state()
        self._points.append(self._point(step))
        set_random_state(random)
        lines = "".join(point.model_dump_json() + "\n" for point in self._points)
        write_atomically(self._path, lines)

    def is_over(self) -> bool:
        """Whether the win rate has risen too long ago for training to go on."""
        return has_ended_early([*self._before, *self._points], self._recipe.evaluate)

    def _point(self, step: int) -> CurvePoint:
        recipe, held_out = self._recipe, self._held_out
        scores: dict[str, float] = {}
        prompts, size = held_out.prompts(), recipe.generate.chunk_size
        for number, first in enumerate(range(0, len(prompts), size)):
            # As the round's own measuring draws them, so that its last point is the round's win rate.
            seed = derive_seed(recipe.seed, HELD_OUT, "answers", number)
            chunk = list(prompts[first : first + size])
            groups, _ = answer_and_score(chunk, held_out.sample, held_out.score, seed)
            scores |= {g.prompt.id: g.scores[ANSWER] for g in groups if g.scores}
        held_out.release()
        before = {group.prompt.id: group.scores.get(ANSWER) for group in held_out.start()}
        own, other = list(scores.values()), [before.get(name) for name in scores]
        wins = win_rate(own, other, seed=recipe.seed).estimate
        return CurvePoint(
            round=self._round,
            step=step,
            win_rate=wins.value if wins else None,
            low=wins.low if wins else None,
            high=wins.high if wins else None,
            score=fmean(own) if own else None,
            prompts=wins.count if wins else 0,
        )
