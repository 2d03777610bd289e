"""The win rate in the middle of training: every k optimiser steps, on the same prompts and random numbers.

The weights that are trained, and the random numbers that training draws, are the same with it and without.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from prefloop.evaluate.answers import ANSWER
from prefloop.evaluate.curves import CURVE
from prefloop.evaluate.winrate import win_rate
from prefloop.judges import NoVerdict
from prefloop.records import Candidates, CurvePoint, Request
from prefloop.run_folder import RoundDir, write_atomically
from prefloop.seeds import derive_seed
from prefloop.train.checkpoint import random_state, set_random_state

if TYPE_CHECKING:
    from prefloop.run.session import Session


class TrainingCurve:
    """Called after each step of a round's training. A point that is there is not measured again.

    A killed training goes on through the same weights, so the points that it left are true; a checkpoint is
    written after its step's point, so none is missing.
    """

    def __init__(self, session: Session, here: RoundDir, first_step: int) -> None:
        """`first_step`: optimiser steps of the rounds before."""
        self._session = session
        self._here = here
        self._first = first_step
        self._every = session.recipe.evaluate.every_steps
        self._path = here.path / f"{CURVE}.jsonl"
        self._points = here.records(CURVE, CurvePoint) if self._path.exists() else []

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

    def _point(self, step: int) -> CurvePoint:
        session, recipe = self._session, self._session.recipe
        scores: dict[str, float] = {}
        prompts, size = session.held_out(), recipe.generate.chunk_size
        engine = session.engine_at(session.place)
        sampling = recipe.evaluate.sampling or recipe.method.sampling
        for number, start in enumerate(range(0, len(prompts), size)):
            part = list(prompts[start : start + size])
            asks = [Request(messages=prompt.messages) for prompt in part]
            # As the round's own measuring draws them, so that its last point is the round's win rate.
            seed = derive_seed(recipe.seed, "held-out", "answers", number)
            with session.policy_at(session.place).merged():
                answers = engine.sample(asks, sampling, seed=seed, label="win rate")
            verdicts = session.score_answers(part, [answer.text for answer in answers])
            scores |= {
                prompt.id: verdict[0]
                for prompt, verdict in zip(part, verdicts, strict=True)
                if not isinstance(verdict, NoVerdict)
            }
        engine.release()
        start_answers = session.rundir.round(-1).stream("answers", Candidates)
        before = {group.prompt.id: group.scores.get(ANSWER) for group in start_answers}
        own, other = list(scores.values()), [before.get(name) for name in scores]
        found = win_rate(own, other, seed=recipe.seed).estimate
        return CurvePoint(
            round=self._here.number,
            step=step,
            win_rate=found.value if found else None,
            low=found.low if found else None,
            high=found.high if found else None,
            score=fmean(own) if own else None,
            prompts=found.count if found else 0,
        )
