"""A model made ready for decoding on a CPU: layers in C where they have the form, else linear layers with reordered weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from prefloop.generate.cpu.layers import fused
from prefloop.generate.cpu.products import Reordered, is_hooked, product_of


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """A value that changes with any bit of a parameter, with the active adapters and their scales, and with who is hooked."""
    parts = list(model.modules())
    adapters = [
        (layer.disable_adapters, tuple(layer.active_adapters), dict(getattr(layer, "scaling", {})))
        for layer in parts
        if isinstance(layer, BaseTunerLayer)
    ]
    hooked = tuple(n for n, part in enumerate(parts) if is_hooked(part) or "forward" in vars(part))
    return (hooked, *adapters, *(_bits(parameter) for parameter in model.parameters()))


def _bits(values: Tensor) -> int:
    """A checksum: the sum of the tensor's bytes read as integers."""
    if hasattr(values, "__tensor_flatten__"):  # a quantised weight is made of several tensors
        parts, _ = values.__tensor_flatten__()
        return sum(_bits(getattr(values, part)) for part in parts)
    flat = values.detach().contiguous().view(-1)
    words = flat.view(torch.uint8 if flat.numel() * flat.element_size() % 8 else torch.int64)
    return int(words.sum(dtype=torch.int64))


class Prepared:
    """Faster forms of a model's layers, on CPUs: of float32, and of bfloat16 that they multiply.

    They hold copies of the weights, with the active adapters, and serve while these do not change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        covered: set[nn.Module] = set()
        # A layer comes before the layers that it is made of.
        for layer in model.modules():
            if layer not in covered and (faster := fused(layer) or _reordered(layer)):
                self._layers.append((layer, faster))
                covered.update(layer.modules())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which the layers compute so."""
        usual = [layer.__dict__.get("forward") for layer, _ in self._layers]
        try:
            for layer, faster in self._layers:
                layer.forward = faster
            yield
        finally:
            for (layer, _), forward in zip(self._layers, usual, strict=True):
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.forward = forward


def _reordered(layer: nn.Module) -> Reordered | None:
    product = product_of(layer)
    return None if product is None else Reordered(product)
