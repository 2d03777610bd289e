"""IPO: the difference of the answers' log-ratios is regressed to a fixed value.

Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences"
(arXiv:2310.12036), equation 17. The gap is taken per token, as in TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from prefloop.methods._pair_method import PairMethod, pair_metrics
from prefloop.records import Pair

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput


class IPO(PairMethod):
    """Identity Preference Optimization: a squared loss towards a fixed difference of log-ratios."""

    defaults: ClassVar = {
        "loop": {"rounds": 1},
        "train": {"epochs": 1, "lr": 5e-7, "schedule": "cosine", "warmup": 0.1, "batch_size": 32},
    }

    beta: float = Field(default=0.1, gt=0.0)
    """The paper's tau: the target of the difference in log-ratio per token is 1 / (2 beta). Our default is DPO's."""

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """(r(y_w)/|y_w| - r(y_l)/|y_l| - 1/(2 beta))^2 of B pairs."""
        from prefloop.train import losses

        r_c, r_r = (logps.ratio(role) for role in self.roles)
        length_c, length_r = (logps.lengths[role] for role in self.roles)
        loss_B = losses.ipo(
            r_c, r_r, chosen_length_B=length_c, rejected_length_B=length_r, beta=self.beta
        )
        gap_B = (r_c / length_c - r_r / length_r).detach()
        metrics = pair_metrics(r_c, r_r, self.beta) | {"gap": gap_B}
        return losses.LossOutput(loss_B, metrics)

    def loss_at_start(self, pairs: Sequence[Pair]) -> float | None:
        """The squared target (1 / (2 beta))^2, as the difference is 0."""
        return (1 / (2 * self.beta)) ** 2
