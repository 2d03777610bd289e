"""DPOP: DPO with a penalty where the chosen answer becomes less likely than under the reference.

Source: Pal et al. 2024, "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive"
(arXiv:2402.13228). SPACP, the loss of IAL, takes its penalty from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from prefloop.methods._pair_method import PairMethod, pair_metrics
from prefloop.records import Pair

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput


class DPOP(PairMethod):
    """DPO-Positive: DPO with a penalty where the chosen answer becomes less likely."""

    defaults: ClassVar = {
        "loop": {"rounds": 1},
        "train": {"epochs": 1, "lr": 5e-7, "schedule": "cosine", "warmup": 0.1, "batch_size": 32},
    }

    beta: float = Field(default=0.1, gt=0.0)
    """Inverse temperature of the implicit reward. Our default is DPO's, so that the two compare."""
    gamma: float = Field(default=5.0, ge=0.0)
    """Weight of the penalty, the paper's lambda; 0 gives DPO. Our default is IAL's gamma (its section 4.1)."""

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """-log sigma(beta (r(y_w) - r(y_l) - gamma max(0, -r(y_w)))) of B pairs."""
        from prefloop.train import losses

        r_c, r_r = (logps.ratio(role) for role in self.roles)
        loss_B = losses.dpop(r_c, r_r, beta=self.beta, gamma=self.gamma)
        metrics = pair_metrics(r_c, r_r, self.beta) | {"penalty": losses.penalty(r_c.detach())}
        return losses.LossOutput(loss_B, metrics)

    def loss_at_start(self, pairs: Sequence[Pair]) -> float | None:
        """log 2, as the penalty starts at 0."""
        return math.log(2)
