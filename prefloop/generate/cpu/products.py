"""Matrix products with weights in oneDNN's memory layout, valid while the weights do not change.

Plain products reorder the weights at every call, and on CPUs their last bits can depend on the number of rows.
With reordered weights neither happens, except for a single row (see below). The price is a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from prefloop.models.lora_linear import is_joined, joined_weights, merged_weight

# I and O features, R the adapter's rank, W = I + R where the adapter is a part of the product, else I.


class Product(NamedTuple):
    """What a linear layer multiplies by, its active adapter included."""

    weight_OW: Tensor
    bias_O: Tensor | None
    down_RI: Tensor | None = None
    """An adapter's A, whose product with the input stands beside the input."""


def product_of(layer: nn.Module) -> Product | None:
    """A linear layer as one product, with or without an adapter; None where it is anything else, or not on a CPU."""
    if type(layer) is nn.Linear:
        return Product(layer.weight.detach(), layer.bias) if _can_reorder(layer) else None
    if not isinstance(layer, LoraLinear):
        return None
    base: Any = layer.get_base_layer()
    if type(base) is not nn.Linear or not _can_reorder(base):
        return None
    if any(is_hooked(part) for part in layer.modules() if part is not layer):
        return None
    if is_joined(layer):
        down_RI, wide_OW = joined_weights(layer)
        return Product(wide_OW, base.bias, down_RI)
    weight_OI = merged_weight(layer)
    return None if weight_OI is None else Product(weight_OI, base.bias)


def stacked(products: Sequence[Product]) -> Product:
    """One product in place of several of the same input; their outputs follow each other."""
    biases = [
        product.weight_OW.new_zeros(len(product.weight_OW))
        if product.bias_O is None
        else product.bias_O
        for product in products
    ]
    bias_O = None if all(product.bias_O is None for product in products) else torch.cat(biases)
    downs = [product.down_RI for product in products if product.down_RI is not None]
    if not downs:
        return Product(torch.cat([product.weight_OW for product in products]), bias_O)
    down_RI = torch.cat(downs)
    inputs = down_RI.shape[1]
    weights_OI = torch.cat([product.weight_OW[:, :inputs] for product in products])
    # Each adapter's columns stand beside its own layer's rows.
    adapters = [product.weight_OW[:, inputs:] for product in products]
    adapters_OR: Tensor = torch.block_diag(*adapters)  # type: ignore[no-untyped-call]
    return Product(torch.cat([weights_OI, adapters_OR], dim=1), bias_O, down_RI)


class Reordered:
    """A product with its weights in oneDNN's layout."""

    def __init__(self, product: Product) -> None:
        self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(product.weight_OW, None)
        self._bias, self._down = product.bias_O, product.down_RI

    def __call__(self, values: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        single_row = values.numel() == values.shape[-1]
        if single_row:
            # With AVX-512 a single long row is summed in another order than several rows.
            values = torch.cat([values, values], dim=-2)
        if self._down is not None:
            values = torch.cat([values, linear(values, self._down)], dim=-1)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            values, self._weight, self._bias, "none", [], ""
        )
        return output[..., :1, :] if single_row else output


def _can_reorder(layer: nn.Linear) -> bool:
    """Whether oneDNN multiplies the layer's weights on this CPU, and no hook has replaced its forward."""
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and type(weight) is nn.Parameter  # not a quantised one
        and is_multiplied(weight.dtype)
        and "forward" not in layer.__dict__
    )


def is_hooked(part: nn.Module) -> bool:
    """Whether a forward pass through the module calls somebody else too."""
    return bool(part._forward_hooks or part._forward_pre_hooks)


def is_multiplied(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this dtype here."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bfloat16())


def _has_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, or oneDNN emulates them."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
