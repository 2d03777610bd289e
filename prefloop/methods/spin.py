"""SPIN: the data's answer over the policy's own sample, until the two are indistinguishable.

Source: Chen et al. 2024, "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models"
(arXiv:2401.01335), Algorithm 1; the values are those of its experiments with zephyr-7b-sft-full, and
of the baseline in "Introspective Adversarial Learning", section 4.2, where that differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field

from prefloop.methods import Actors, Method, Reference, pair_of
from prefloop.methods._gates import Gates
from prefloop.methods._pair_method import dpo_loss
from prefloop.records import (
    Candidates,
    Pair,
    Prompt,
    Reject,
    Request,
    Response,
    Sampling,
    as_tuple,
    derive_seed,
)

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput

_Beta = Annotated[float, Field(gt=0.0)]
_Betas = Annotated[tuple[_Beta, ...], Field(min_length=1)]


class SPIN(Method):
    """Self-Play Fine-Tuning: the target over the policy's own answer, from the round's start."""

    needs_target: ClassVar[bool] = True
    defaults: ClassVar = {
        "loop": {"rounds": 4, "mix_previous": True, "lr_factors": [1.0, 1.0, 0.2, 0.2]},
        "train": {
            "epochs": 2,
            "lr": 5e-7,
            "optimizer": "rmsprop",
            "schedule": "linear",
            "warmup": 0.1,
            "batch_size": 64,
        },
    }

    reference: Reference = "round_start"
    """Algorithm 1: the opponent, and the reference, is the policy at the round's start."""
    beta: Annotated[_Beta | _Betas, BeforeValidator(as_tuple)] = (0.1, 0.1, 0.1, 5.0)
    """The paper's lambda, by round, or one for all; the last holds for all that follow. Its section 6.1 takes 5.0 in iteration 3; IAL section 4.2 keeps 0.1."""
    sampling: Sampling = Sampling(temperature=1.0)
    """How the policy answers: the loss assumes samples of the policy itself, at temperature 1; IAL's runs have 0.7."""
    gates: Gates = Gates(cut_off=False, meta_talk=False)
    """A sample that the length limit cut off is trained on, as in the paper's code."""

    def in_round(self, round: int) -> SPIN:
        """The method with this round's beta only."""
        if isinstance(self.beta, float):
            return self
        return self.model_copy(update={"beta": self.beta[min(round, len(self.beta) - 1)]})

    def generate(self, prompts: Sequence[Prompt], actors: Actors) -> Iterator[Candidates | Reject]:
        """One sample of the policy for each prompt, beside the data's target."""
        asks = [Request(messages=prompt.messages) for prompt in prompts]
        seed = derive_seed(actors.seed, "sample")
        samples = actors.policy.sample(asks, self.sampling, seed=seed, label="opponent")
        for prompt, sample in zip(prompts, samples, strict=True):
            target = Response(text=prompt.target or "")
            yield Candidates(prompt=prompt, responses={"target": target, "sample": sample})

    def rank(self, groups: Sequence[Candidates], actors: Actors) -> Iterator[Candidates | Reject]:
        """The target is the better one by definition."""
        yield from groups

    def pair(self, ranked: Iterable[Candidates], round: int) -> Iterator[Pair | Reject]:
        """The target over the policy's own answer."""
        for group in ranked:
            yield self.gates.reject(group, "target", "sample") or pair_of(
                group, "target", "sample", round
            )

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """DPO of target over sample, -log sigma(beta (r(y_t) - r(y))), of B pairs."""
        beta = self.beta if isinstance(self.beta, float) else self.beta[0]
        return dpo_loss(logps, self.roles, beta)

    def loss_at_start(self, pairs: Sequence[Pair]) -> float | None:
        """log 2, as both log-ratios are 0."""
        return math.log(2)
