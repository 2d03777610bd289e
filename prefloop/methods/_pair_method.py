"""The base of methods that only add a loss (DPO, IPO, DPOP ...): pairs from the data's labels, or from judged drafts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from prefloop.methods import Actors, Generator, Method, pair_of, scored
from prefloop.methods._gates import Gates
from prefloop.records import (
    Candidates,
    Pair,
    Prompt,
    Reject,
    Request,
    Response,
    Sampling,
    derive_seed,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prefloop.train.losses import GroupLogps, LossOutput

LABELLED = ("chosen", "rejected")


class PairMethod(Method):
    """A method that adds a loss for pairs; the pairs are the data's, or drafts ordered by the judge."""

    roles: ClassVar[tuple[str, ...]] = LABELLED
    first_read: ClassVar = {"gates": "pair"}

    pairs: Literal["data", "drafts"] = "data"
    """The data's labelled pairs, or two drafts of each prompt, ordered by the recipe's judge."""
    generator: Generator = "frozen"
    """drafts: whose. The initial policy's make a static set (AROP section 5.1's baseline, there written by GPT-4)."""
    gates: Gates = Gates()
    """drafts: when a pair is not worth training on. Labelled pairs pass as they are."""

    @property
    def needs_pairs(self) -> bool:
        """True with `pairs: data`."""
        return self.pairs == "data"

    @property
    def needs_judge(self) -> bool:
        """True with `pairs: drafts`."""
        return self.pairs == "drafts"

    def generate(self, prompts: Sequence[Prompt], actors: Actors) -> Iterator[Candidates | Reject]:
        """The labelled answers, or two drafts of each prompt."""
        if self.pairs == "data":
            yield from map(labelled, prompts)
        else:
            yield from drafts(prompts, actors, self.sampling, 2)

    def rank(self, groups: Sequence[Candidates], actors: Actors) -> Iterator[Candidates | Reject]:
        """Labelled pairs are in order already; drafts are scored by the judge."""
        if self.pairs == "data":
            yield from groups
            return
        yield from scored(groups, actors.judge)

    def pair(self, ranked: Iterable[Candidates], round: int) -> Iterator[Pair | Reject]:
        """The pair of each group: labelled, or best over worst draft."""
        for group in ranked:
            yield best_over_worst(group, self.gates, round)


def labelled(prompt: Prompt) -> Candidates | Reject:
    """The data's labelled pair as a group with the responses "chosen" and "rejected"."""
    if prompt.chosen is None or prompt.rejected is None:
        return Reject(prompt_id=prompt.id, stage="generate", reason="no labelled pair")
    answers = {"chosen": prompt.chosen, "rejected": prompt.rejected}
    return Candidates(
        prompt=prompt, responses={name: Response(text=text) for name, text in answers.items()}
    )


def drafts(
    prompts: Sequence[Prompt], actors: Actors, sampling: Sampling, count: int
) -> Iterator[Candidates]:
    """`count` answers of the generating policy to each prompt, "draft_0", "draft_1" and so on."""
    asks = [Request(messages=prompt.messages) for prompt in prompts for _ in range(count)]
    seed = derive_seed(actors.seed, "drafts")
    found = iter(actors.policy.sample(asks, sampling, seed=seed, label="drafts") if asks else ())
    for prompt in prompts:
        yield Candidates(prompt=prompt, responses={f"draft_{n}": next(found) for n in range(count)})


def best_over_worst(group: Candidates, gates: Gates, round: int) -> Pair | Reject:
    """The labelled pair, or for a scored group its best response over its worst, after the gates."""
    if not group.scores:
        return pair_of(group, *LABELLED, round)
    best = max(group.scores, key=group.scores.__getitem__)
    worst = min(group.scores, key=group.scores.__getitem__)
    if group.scores[best] == group.scores[worst]:
        return Reject(
            prompt_id=group.prompt.id,
            stage="pair",
            reason="tie",
            detail=f"every response scores {group.scores[best]:g}",
        )
    return gates.reject(group, best, worst) or pair_of(group, best, worst, round)


def dpo_loss(logps: GroupLogps, roles: Sequence[str], beta: float) -> LossOutput:
    """-log sigma(beta (r(y_w) - r(y_l))) of B pairs, whose two roles are named chosen first."""
    from prefloop.train import losses

    r_c, r_r = (logps.ratio(role) for role in roles)
    return losses.LossOutput(losses.dpo(r_c, r_r, beta=beta), pair_metrics(r_c, r_r, beta))


def pair_metrics(chosen_B: Tensor, rejected_B: Tensor, beta: float) -> dict[str, Tensor]:
    """Training metrics of every loss of pairs, from the log-ratios r (nats) of B pairs."""
    chosen_B, rejected_B = beta * chosen_B.detach(), beta * rejected_B.detach()
    return {
        "reward_margin": chosen_B - rejected_B,
        "real_reward": chosen_B,
        "reward_chosen": chosen_B,
        "reward_rejected": rejected_B,
        "accuracy": (chosen_B > rejected_B).float(),
    }
