"""DPO: the policy is trained on pairs directly, without a reward model.

Source: Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290), equation 7. Its
schedule is that of the baseline in "Introspective Adversarial Learning", section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from prefloop.methods._pair_method import PairMethod, dpo_loss
from prefloop.records import Pair

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput


class DPO(PairMethod):
    """Direct Preference Optimization on labelled pairs, or on drafts that a judge puts in order."""

    defaults: ClassVar = {
        "loop": {"rounds": 3},
        "train": {
            "epochs": 2,
            "lr": 5e-7,
            "optimizer": "adamw",
            "schedule": "cosine",
            "warmup": 0.1,
            "batch_size": 32,
        },
    }

    beta: float = Field(default=0.1, gt=0.0)
    """Inverse temperature of the implicit reward. IAL section 4.2: 0.1."""

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """-log sigma(beta (r(y_w) - r(y_l))) of B pairs."""
        return dpo_loss(logps, self.roles, self.beta)

    def loss_at_start(self, pairs: Sequence[Pair]) -> float | None:
        """log 2, as both log-ratios are 0."""
        return math.log(2)
