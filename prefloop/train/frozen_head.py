"""Log-probs under a head that is not trained, with the gradient of its inputs taken on the way.

A log-prob depends on one hidden state only, so its gradient is known up to a factor before any loss is:
the head's row of the target minus the mean of its rows under the softmax. Taken while the logits exist, it
costs one matrix product; computing the logits again in the backward pass would cost two.

Shapes: N scored tokens, C of them at a time, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class _FrozenHeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        size: int,
    ) -> Tensor:
        logps_N = torch.empty(len(states_NH), dtype=torch.float32, device=states_NH.device)
        slopes_NH = torch.empty_like(states_NH) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states_NH), size):
            chunk = slice(start, start + size)
            logits_CV = linear(states_NH[chunk], weight_VH, bias_V).float()
            targets_C = targets_N[chunk]
            norms_C = logits_CV.logsumexp(-1)
            logps_N[chunk] = logits_CV.gather(1, targets_C[:, None])[:, 0] - norms_C
            if slopes_NH is not None:
                probs_CV = logits_CV.sub_(norms_C[:, None]).exp_().to(weight_VH.dtype)
                slopes_NH[chunk] = weight_VH[targets_C] - probs_CV @ weight_VH
        if slopes_NH is not None:
            ctx.save_for_backward(slopes_NH)
        return logps_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_NH,) = ctx.saved_tensors
        return (g_N[:, None] * slopes_NH).to(slopes_NH.dtype), None, None, None, None


def frozen_head_logps(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, *, size: int
) -> Tensor:
    """(N,) float32 log-probs of the targets in nats; `size` rows of logits exist at a time."""
    assert not weight_VH.requires_grad, "no gradient reaches a frozen head"
    logps_N = _FrozenHeadLogps.apply(states_NH, weight_VH, bias_V, targets_N, size)  # type: ignore[no-untyped-call]
    assert isinstance(logps_N, Tensor)
    return logps_N
