"""Self-rewarding: the policy samples several answers, judges them itself, and learns the best over the worst.

Source: Yuan et al. 2024, "Self-Rewarding Language Models" (arXiv:2401.10020), section 2. The judge is the
recipe's: `self_judge` is the policy itself, by its rating tokens. New prompts are not generated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from prefloop.methods import Actors, Method, Reference, scored
from prefloop.methods._gates import Gates
from prefloop.methods._pair_method import best_over_worst, dpo_loss, drafts
from prefloop.records import Candidates, Pair, Prompt, Reject, Sampling

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput


class SelfRewarding(Method):
    """Self-Rewarding: the best of several own answers over the worst, as judged by the policy."""

    needs_judge: ClassVar[bool] = True
    defaults: ClassVar = {
        "loop": {"rounds": 2},
        "train": {"epochs": 1, "lr": 1e-6, "schedule": "linear", "batch_size": 16},
    }

    reference: Reference = "round_start"
    """Section 2.4: M_t+1 is trained with DPO from M_t."""
    candidates: int = Field(default=4, ge=2)
    """Answers to each prompt. Section 3.1.2: N = 4."""
    beta: float = Field(default=0.1, gt=0.0)
    """Inverse temperature of the implicit reward. Section 3.1.3: 0.1."""
    sampling: Sampling = Sampling(temperature=0.7, top_p=0.9)
    """Section 3.1.2: T = 0.7, p = 0.9."""
    gates: Gates = Gates()
    """Filters of the pair of best and worst; equal scores are always rejected (section 2.3)."""

    def generate(self, prompts: Sequence[Prompt], actors: Actors) -> Iterator[Candidates | Reject]:
        """Several answers to each prompt."""
        yield from drafts(prompts, actors, self.sampling, self.candidates)

    def rank(self, groups: Sequence[Candidates], actors: Actors) -> Iterator[Candidates | Reject]:
        """The judge's score of every answer."""
        yield from scored(groups, actors.judge)

    def pair(self, ranked: Iterable[Candidates], round: int) -> Iterator[Pair | Reject]:
        """The best answer of each group over its worst."""
        for group in ranked:
            yield best_over_worst(group, self.gates, round)

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """DPO, -log sigma(beta (r(y_w) - r(y_l))), of B pairs."""
        return dpo_loss(logps, self.roles, self.beta)

    def loss_at_start(self, pairs: Sequence[Pair]) -> float | None:
        """log 2, as both log-ratios are 0."""
        return math.log(2)

    def measures(self, ranked: Sequence[Candidates]) -> dict[str, float | None]:
        """Means over prompts of the best, mean and worst score."""
        if not ranked:
            return {}
        groups = [list(group.scores.values()) for group in ranked]
        return {
            "score_best": sum(map(max, groups)) / len(groups),
            "score_mean": sum(sum(group) / len(group) for group in groups) / len(groups),
            "score_worst": sum(map(min, groups)) / len(groups),
        }
