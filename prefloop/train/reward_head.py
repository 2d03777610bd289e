"""The linear reward over frozen features: a convex fit, the same whatever the order of the pairs.

Shapes: N pairs, F features.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from prefloop.errors import TrainingError
from prefloop.train.losses import bradley_terry


def fit_head(
    chosen_NF: NDArray[np.float32],
    rejected_NF: NDArray[np.float32],
    margin_N: NDArray[np.float32],
    *,
    l2: float,
) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Weights (F,) that minimise mean Bradley-Terry loss + l2 |w|^2, and the loss before and after.

    Raises TrainingError where the loss is no number.
    """
    chosen, rejected, margin = map(torch.from_numpy, (chosen_NF, rejected_NF, margin_N))
    weights_F = torch.zeros(chosen_NF.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_F], max_iter=200, line_search_fn="strong_wolfe")

    def mean_loss() -> torch.Tensor:
        return bradley_terry(chosen @ weights_F, rejected @ weights_F, margin, centering=0.0).mean()

    def closure() -> float:
        optimizer.zero_grad()
        loss = mean_loss() + l2 * (weights_F**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    first = float(mean_loss().detach())
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    last = float(mean_loss().detach())
    if not np.isfinite(last):
        raise TrainingError("the head's loss is not finite; raise train.l2 or look at the pairs")
    return weights_F.detach().numpy(), {"first_loss": first, "last_loss": last}
