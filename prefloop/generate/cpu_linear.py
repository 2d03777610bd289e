"""Linear layers with weights in oneDNN's memory layout, valid while the weights do not change.

Plain matrix products reorder the weights at every call, and on CPUs their last bits can depend on the number
of rows. With reordered weights neither happens, except for a single row (see below). The price is a copy of
the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from prefloop.models.lora_linear import is_joined, joined_weights


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """A value that changes with any bit of a parameter, and with the active adapters."""
    adapters = [
        (layer.disable_adapters, tuple(layer.active_adapters))
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    return (*adapters, *(_bits(parameter) for parameter in model.parameters()))


def _bits(values: Tensor) -> int:
    """A checksum: the sum of the tensor's bytes read as integers."""
    if hasattr(values, "__tensor_flatten__"):  # a quantised weight is made of several tensors
        parts, _ = values.__tensor_flatten__()
        return sum(_bits(getattr(values, part)) for part in parts)
    flat = values.detach().contiguous().view(-1)
    words = flat.view(torch.uint8 if flat.numel() * flat.element_size() % 8 else torch.int64)
    return int(words.sum(dtype=torch.int64))


class ReorderedLinears:
    """Copies of a model's linear weights in oneDNN's layout, on CPUs: of float32, and of bfloat16 that they multiply.

    Where an adapter is added within a layer's product, in bfloat16, its columns are part of the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[tuple[nn.Module, _Reordered]] = []
        covered: set[nn.Module] = set()
        # A LoRA layer comes before the layers that it is made of.
        for layer in model.modules():
            if layer in covered:
                continue
            if is_joined(layer) and _can_reorder(layer.get_base_layer()):  # type: ignore[operator]
                down, wide = joined_weights(layer)
                base: Any = layer.get_base_layer()  # type: ignore[operator]
                self._layers.append((layer, _Reordered(wide, base.bias, down)))
                covered.update(layer.modules())
            elif type(layer) is nn.Linear and _can_reorder(layer):
                self._layers.append((layer, _Reordered(layer.weight.detach(), layer.bias)))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which the layers compute with the copies."""
        usual = [layer.__dict__.get("forward") for layer, _ in self._layers]
        for layer, reordered in self._layers:
            layer.forward = reordered
        try:
            yield
        finally:
            for (layer, _), forward in zip(self._layers, usual, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


class _Reordered:
    def __init__(self, weight: Tensor, bias: Tensor | None, down: Tensor | None = None) -> None:
        """`down`: an adapter's A, whose product with the input stands beside the input."""
        self.weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias, self.down = bias, down

    def __call__(self, values: Tensor) -> Tensor:
        single_row = values.numel() == values.shape[-1]
        if single_row:
            # With AVX-512 a single long row is summed in another order than several rows.
            values = torch.cat([values, values], dim=-2)
        if self.down is not None:
            values = torch.cat([values, linear(values, self.down)], dim=-1)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            values, self.weight, self.bias, "none", [], ""
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


def is_multiplied(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this dtype here."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bfloat16())


def _has_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, or oneDNN emulates them."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
