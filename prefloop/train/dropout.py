"""A base model without the noise that it was pretrained with: dropout, and the jitter of some routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, a model in training mode computes without noise but for the adapter's own dropout.

    Layers stay in training mode, as gradient checkpointing and some kernels ask for it.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters = {
        id(own)
        for layer in base.modules()
        if isinstance(layer, BaseTunerLayer)
        for own in getattr(layer, "lora_dropout", nn.ModuleDict()).modules()
    }
    before: list[tuple[Any, str, Any]] = []
    for module in base.modules():
        if id(module) in adapters:
            continue
        if isinstance(module, _DropoutNd):
            before.append((module, "p", module.p))
        before += [(module, name, value) for name, value in _rates(module)]
    configs = {id(c): c for c in (getattr(m, "config", None) for m in base.modules()) if c}
    before += [(c, name, value) for c in configs.values() for name, value in _rates(c)]
    for owner, name, _ in before:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _rates(owner: Any) -> list[tuple[str, float]]:
    """Names and values of what some forward passes read as the rate of dropout or jitter."""
    words = ("drop", "jitter")
    return [
        (name, value)
        for name, value in vars(owner).items()
        if isinstance(value, float) and value > 0 and any(word in name for word in words)
    ]
