"""SFT: supervised fine-tuning on the data's target answers, as a baseline in the same loop.

Source: the loss is equation 4 of "Introspective Adversarial Learning"; the schedule that of its appendix
B.2.2. The recipe's section `sft` does the same once, before another method begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from prefloop.methods import Actors, Method
from prefloop.records import Candidates, Pair, Prompt, Reject

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput


class SFT(Method):
    """Supervised fine-tuning: each round on the targets of its prompts; nothing is generated or ranked."""

    needs_target: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("target",)
    defaults: ClassVar = {
        "loop": {"rounds": 1},
        "train": {"epochs": 2, "lr": 2e-4, "optimizer": "adamw", "batch_size": 32},
    }

    def generate(self, prompts: Sequence[Prompt], actors: Actors) -> Iterator[Candidates | Reject]:
        """Groups without responses: the targets are in the data."""
        for prompt in prompts:
            yield Candidates(prompt=prompt, responses={})

    def rank(self, groups: Sequence[Candidates], actors: Actors) -> Iterator[Candidates | Reject]:
        """The groups unchanged: there is nothing to rank."""
        yield from groups

    def pair(self, ranked: Iterable[Candidates], round: int) -> Iterator[Pair | Reject]:
        """One example per target, without a rejected answer."""
        for group in ranked:
            assert group.prompt.target is not None
            yield Pair(
                prompt_id=group.prompt.id,
                round=round,
                prompt=group.prompt.messages,
                chosen=group.prompt.target,
                rejected="",
                target=group.prompt.target,
                origin={"chosen": "target"},
            )

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """-log pi(y_t|x) / |y_t| of B targets."""
        from prefloop.train import losses

        loss_B = losses.sft(logps.policy["target"], logps.lengths["target"])
        return losses.LossOutput(loss_B, {"target_logprob": -loss_B.detach()})
