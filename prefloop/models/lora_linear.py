"""LoRA layers that write the adapter's part into the base layer's output instead of adding copies.

PEFT computes W·x, then s·B·(A·x) beside it, scales it and adds it: six passes over an output-sized tensor
that memory, not arithmetic, pays for, and as many in the backward pass. The same sums are taken here
inside the matrix products. Whatever is not the plain case is PEFT's as before.

In bfloat16 both parts are one product, [W | s·B] times [x | A·x], which is summed in float32 and rounded
once. Rounded before the adapter's part comes to it, W·x hides whatever is smaller than half of its last
digit, and that is most of what a young adapter adds (docs/decisions/0021).

Shapes: M rows of the input, I and O features, R the rank, W = I + R.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad


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


class _WideLoraLinear(torch.autograd.Function):
    """The layer in bfloat16 with its adapter in float32, whose gradients are products in bfloat16."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        wide_OW: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        inputs = x_MI.shape[1]
        low_RI = a_RI.to(x_MI.dtype)
        wide_OW[:, inputs:] = b_OR * scaling  # of this step, into its place
        down_MR = x_MI @ low_RI.t()
        ctx.save_for_backward(x_MI, low_RI, wide_OW[:, inputs:].clone(), down_MR)
        # Not through save_for_backward: the next call writes the adapter's columns, which the backward pass does not read.
        ctx.weight_OI, ctx.scaling, ctx.dtype = wide_OW[:, :inputs], scaling, a_RI.dtype
        return linear(torch.cat([x_MI, down_MR], dim=1), wide_OW, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, low_RI, scaled_b_OR, down_MR = ctx.saved_tensors
        g_down_MR = g_MO @ scaled_b_OR
        g_x_MI = None
        if ctx.needs_input_grad[0]:
            g_x_MI = (g_MO @ ctx.weight_OI).addmm_(g_down_MR, low_RI)
        g_a_RI = (g_down_MR.t() @ x_MI).to(ctx.dtype)
        g_b_OR = (g_MO.t() @ down_MR).to(ctx.dtype).mul_(ctx.scaling)
        return g_x_MI, None, None, g_a_RI, g_b_OR, None


def fuse(model: nn.Module) -> None:
    """Give every plain LoRA layer of a PEFT model the fused forward; numbers change by rounding only.

    Call it when the weights are where they stay: in bfloat16 they move into rows that the adapter's columns end.
    """
    for layer in model.modules():
        if isinstance(layer, Linear) and type(base := layer.get_base_layer()) is nn.Linear:
            layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
            # A quantised weight has this dtype too, and another type.
            if base.weight.dtype == torch.bfloat16 and type(base.weight) is nn.Parameter:
                _widen(layer)


def narrow(model: nn.Module) -> None:
    """Give weights rows of their own again, as sharding wants them; the adapter is then added as PEFT does."""
    layer: Any
    for layer in model.modules():
        if layer.__dict__.pop("wide_weight", None) is not None:
            weight = layer.get_base_layer().weight
            weight.data = weight.data.contiguous()


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _is_plain(layer, x.dtype):
        usual: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return usual
    (name,) = layer.active_adapters
    base, a, b = layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight
    flat_MI = x.reshape(-1, x.shape[-1])
    if x.dtype != torch.bfloat16:
        flat_MO = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            flat_MI, base.weight, base.bias, a, b, layer.scaling[name]
        )
    elif layer.disable_adapters:
        # The same product as with the adapter, so that a fresh one, whose B is 0, changes no bit.
        flat_MO = linear(pad(flat_MI, (0, b.shape[1])), layer.wide_weight, base.bias)
    else:
        flat_MO = _WideLoraLinear.apply(  # type: ignore[no-untyped-call]
            flat_MI, layer.wide_weight, base.bias, a, b, layer.scaling[name]
        )
    output: Tensor = flat_MO.view(*x.shape[:-1], b.shape[0])
    return output


def is_joined(layer: nn.Module) -> bool:
    """Whether a LoRA layer adds its active adapter within its own product, as in bfloat16."""
    untyped: Any = layer
    return (
        isinstance(layer, Linear)
        and "forward" in layer.__dict__
        and not untyped.disable_adapters
        and _is_plain(layer, torch.bfloat16)
    )


def joined_weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Of a joined layer, in bfloat16 and as they are now: A, (R, I), and [W | s·B], (O, W)."""
    untyped: Any = layer
    (name,) = untyped.active_adapters
    a, b = untyped.lora_A[name].weight.detach(), untyped.lora_B[name].weight.detach()
    weight = untyped.get_base_layer().weight.detach()
    return a.to(weight.dtype), torch.cat(
        [weight, (b * untyped.scaling[name]).to(weight.dtype)], dim=1
    )


def merged_weight(layer: nn.Module) -> Tensor | None:
    """W + s·B·A, (O, I), of a plain layer in float32 as it is now, or W where its adapter is off; else None."""
    untyped: Any = layer
    weight = untyped.get_base_layer().weight.detach()
    if untyped.disable_adapters:
        return None if untyped.merged else weight
    if not _is_plain(layer, torch.float32):
        return None
    (name,) = untyped.active_adapters
    a, b = untyped.lora_A[name].weight.detach(), untyped.lora_B[name].weight.detach()
    return torch.addmm(weight, b, a, alpha=untyped.scaling[name])


def _widen(layer: Any) -> None:
    """Move the base layer's weight into a matrix with room for the adapter's columns, (O, W)."""
    weight = layer.get_base_layer().weight
    (name,) = layer.active_adapters
    with torch.inference_mode(False), torch.no_grad():
        wide_OW = weight.new_zeros(weight.shape[0], weight.shape[1] + layer.r[name])
        wide_OW[:, : weight.shape[1]] = weight
        weight.data = wide_OW[:, : weight.shape[1]]
    layer.wide_weight = wide_OW


def _is_wide(layer: Any) -> bool:
    """Whether the base layer's weight lies in the wide matrix: not when it was moved, or the adapter is merged."""
    wide_OW = getattr(layer, "wide_weight", None)
    return wide_OW is not None and wide_OW.data_ptr() == layer.get_base_layer().weight.data_ptr()


def _is_plain(layer: Any, dtype: torch.dtype) -> bool:
    """One adapter without dropout or variants, whole on this device, and active (or off, in bfloat16)."""
    base = layer.get_base_layer()
    device = base.weight.device.type
    if layer.merged:
        return False
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype:
        return False
    in_bfloat16 = dtype == torch.bfloat16
    if in_bfloat16 and not _is_wide(layer):
        return False
    # Generation gives base layers a faster forward, which is to be called.
    if layer.disable_adapters and (not in_bfloat16 or "forward" in base.__dict__):
        return False
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or names[0] in layer.lora_variant:
        return False
    a, b = layer.lora_A[names[0]], layer.lora_B[names[0]]
    adapter_dtype = torch.float32 if in_bfloat16 else dtype
    return (
        isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and b.bias is None
        and base.weight.dtype == dtype
        and a.weight.dtype == b.weight.dtype == adapter_dtype
        # There is room for the rank of the adapter that was there first.
        and (not in_bfloat16 or len(a.weight) == layer.wide_weight.shape[1] - base.weight.shape[1])
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        # Sharded weights are gathered by hooks of the layers that this would not call.
        and all(
            type(w) is nn.Parameter and not hasattr(w, "ds_id")
            for w in (a.weight, b.weight, base.weight)
        )
    )
