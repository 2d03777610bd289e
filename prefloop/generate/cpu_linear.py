"""Linear layers with weights in the CPU's own order, for as long as the weights stay as they are.

Plain matrix products reorder the weights at every call, and on CPUs their last bits can depend on how
many rows there are; the reordered ones do neither, but for a row alone. The price is a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Differs whenever the model computes something else: a bit of a parameter, an adapter switched off."""
    adapters = [
        (layer.disable_adapters, tuple(layer.active_adapters))
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    return (*adapters, *(_bits(parameter.detach()) for parameter in model.parameters()))


def _bits(values: Tensor) -> int:
    """The sum of all bits, as integers."""
    flat = values.contiguous().view(-1)
    words = flat.view(torch.uint8 if flat.numel() * flat.element_size() % 8 else torch.int64)
    return int(words.sum(dtype=torch.int64))


class ReorderedLinears:
    """Copies of a model's linear weights in oneDNN's order; float32 on CPUs, nothing elsewhere."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            (layer, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None))
            for layer in model.modules()
            if type(layer) is nn.Linear and _fits(layer)
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the layers compute with the copies."""
        for layer, weight in self._layers:
            layer.forward = _Reordered(weight, layer.bias)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for layer, _ in self._layers:
                del layer.forward


class _Reordered:
    def __init__(self, weight: Any, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, values: Tensor) -> Tensor:
        alone = values.numel() == values.shape[-1]
        if alone:
            # Long rows alone are summed in another order than several are, where the CPU has AVX-512.
            values = torch.cat([values, values], dim=-2)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            values, self.weight, self.bias, "none", [], ""
        )
        return out[..., :1, :] if alone else out


def _fits(layer: nn.Linear) -> bool:
    """Not where a hook has already put a forward of its own before the layer's."""
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and "forward" not in layer.__dict__
    )
