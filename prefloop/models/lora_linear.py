"""LoRA layers that write the adapter's part into the base layer's output instead of adding copies.

PEFT computes W·x, then s·B·(A·x) beside it, scales it and adds it: six passes over an output-sized tensor
that memory, not arithmetic, pays for, and as many in the backward pass. The same sums are taken here
inside the matrix products. Whatever is not the plain case is PEFT's as before.

Shapes: M rows of the input, I and O features, R the rank.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        down_MR = x_MI @ a_RI.t()
        ctx.save_for_backward(x_MI, weight_OI, a_RI, b_OR, down_MR)
        ctx.scaling = scaling
        return linear(x_MI, weight_OI, bias_O).addmm_(down_MR, b_OR.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, weight_OI, a_RI, b_OR, down_MR = ctx.saved_tensors
        g_down_MR = (g_MO @ b_OR).mul_(ctx.scaling)
        g_x_MI = None
        if ctx.needs_input_grad[0]:
            g_x_MI = (g_MO @ weight_OI).addmm_(g_down_MR, a_RI)
        g_b_OR = (g_MO.t() @ down_MR).mul_(ctx.scaling)
        return g_x_MI, None, None, g_down_MR.t() @ x_MI, g_b_OR, None


def fuse(model: nn.Module) -> None:
    """Give every plain LoRA layer of a PEFT model the fused forward; numbers change by rounding only."""
    for layer in model.modules():
        if isinstance(layer, Linear) and type(layer.get_base_layer()) is nn.Linear:
            layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _is_plain(layer, x):
        usual: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return usual
    (name,) = layer.active_adapters
    base, b = layer.get_base_layer(), layer.lora_B[name].weight
    flat_MO: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]),
        base.weight,
        base.bias,
        layer.lora_A[name].weight,
        b,
        layer.scaling[name],
    )
    return flat_MO.view(*x.shape[:-1], b.shape[0])


def _is_plain(layer: Any, x: Tensor) -> bool:
    """One active adapter without dropout or variants, all in one dtype, whole on this device."""
    if layer.disable_adapters or layer.merged or torch.is_autocast_enabled(x.device.type):
        return False
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or names[0] in layer.lora_variant:
        return False
    a, b, base = layer.lora_A[names[0]], layer.lora_B[names[0]], layer.get_base_layer()
    weights = (a.weight, b.weight, base.weight)
    return (
        isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and b.bias is None
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        # Sharded weights are gathered by hooks of the layers that this would not call.
        and all(
            type(w) is nn.Parameter and w.dtype == x.dtype and not hasattr(w, "ds_id")
            for w in weights
        )
    )
