"""SPAC: pairs, and an adversarial critic that scores the policy's own answers low.

Source: Ji et al. 2024, "Self-Play with Adversarial Critic: Provable and Scalable Offline Alignment for
Language Models" (arXiv:2406.04274), in the form of "Introspective Adversarial Learning", equation 9, and
smoothed as in its appendix B.6. What IAL plots as SPAC (appendix B.3) is IAL with gamma 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from prefloop.methods import Actors, Generator, Reference, sampled_tokens
from prefloop.methods._pair_method import PairMethod, pair_metrics
from prefloop.records import Candidates, Pair, Prompt, Reject, Request, derive_seed

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput

_SAMPLE = "sample"


class SPAC(PairMethod):
    """Self-Play with Adversarial Critic: chosen over rejected, and over the policy's own answer."""

    roles: ClassVar[tuple[str, ...]] = (_SAMPLE, "chosen", "rejected")
    defaults: ClassVar = {
        "loop": {"rounds": 3},
        "train": {
            "epochs": 2,
            "lr": 5e-7,
            "optimizer": "rmsprop",
            "schedule": "linear",
            "warmup": 0.1,
            "batch_size": 32,
        },
    }

    reference: Reference = "round_start"
    """Equation 9 is measured from pi_t, the policy at the round's start."""
    generator: Generator = "current"
    """The policy that generates the sample (and drafts): pi_t itself."""
    eta: float = Field(default=0.1, gt=0.0)
    """Inverse temperature of the implicit reward. IAL section 4.1: 0.1, written beta there."""
    lam: float = Field(default=1.0, ge=0.0)
    """Weight of the preference term. IAL section 4.1: lambda = 1.0."""
    objective: Literal["smoothed", "linear"] = "smoothed"
    """Both terms inside log-sigmoid (IAL appendix B.6), or equation 9, whose first term has no lower bound."""

    def generate(self, prompts: Sequence[Prompt], actors: Actors) -> Iterator[Candidates | Reject]:
        """The pair's answers, and one sample of the policy."""
        groups = list(super().generate(prompts, actors))
        asks = [Request(messages=g.prompt.messages) for g in groups if isinstance(g, Candidates)]
        seed = derive_seed(actors.seed, _SAMPLE)
        samples = iter(actors.policy.sample(asks, self.sampling, seed=seed, label=_SAMPLE))
        for group in groups:
            if isinstance(group, Candidates):
                responses = {**group.responses, _SAMPLE: next(samples)}
                yield group.model_copy(update={"responses": responses})
            else:
                yield group

    def rank(self, groups: Sequence[Candidates], actors: Actors) -> Iterator[Candidates | Reject]:
        """Rank the pair's answers; the sample is not ranked."""
        samples = {group.prompt.id: group.responses[_SAMPLE] for group in groups}
        alone = [
            group.model_copy(
                update={"responses": {n: r for n, r in group.responses.items() if n != _SAMPLE}}
            )
            for group in groups
        ]
        for group in super().rank(alone, actors):
            if isinstance(group, Candidates):
                responses = {**group.responses, _SAMPLE: samples[group.prompt.id]}
                yield group.model_copy(update={"responses": responses})
            else:
                yield group

    def pair(self, ranked: Iterable[Candidates], round: int) -> Iterator[Pair | Reject]:
        """Triples (y, y+, y-) of sample, chosen and rejected."""
        for group in ranked:
            sample = group.responses[_SAMPLE]
            if not sample.text.strip():
                yield Reject(prompt_id=group.prompt.id, stage="pair", reason="empty answer")
                continue
            [found] = super().pair([group], round)
            if isinstance(found, Pair):
                cut = (_SAMPLE,) if sample.finish == "length" else ()
                found = found.model_copy(
                    update={
                        "sample": sample.text,
                        "origin": {**found.origin, _SAMPLE: _SAMPLE},
                        "unfinished": (*found.unfinished, *cut),
                        "token_ids": found.token_ids | sampled_tokens({_SAMPLE: sample}),
                    }
                )
            yield found

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """The SPAC loss of B triples."""
        from prefloop.train import losses

        r_s, r_c, r_r = (logps.ratio(role) for role in self.roles)
        objective = losses.spac_linear if self.objective == "linear" else losses.spac_smoothed
        loss_B = objective(r_s, r_c, r_r, eta=self.eta, lam=self.lam)
        metrics = pair_metrics(r_c, r_r, self.eta) | {"reward_sample": self.eta * r_s.detach()}
        return losses.LossOutput(loss_B, metrics)

    def loss_at_start(self, pairs: Sequence[Pair]) -> float | None:
        """(1 + lambda) log 2 with both terms smoothed, lambda log 2 with a linear first term."""
        return (self.lam if self.objective == "linear" else 1 + self.lam) * math.log(2)
