"""Adapters that begin as a part of the base model's weights: PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024).

PEFT splits an adapted weight W into s·B0·A0 and a rest R. R is frozen in W's place, and training moves A and B
away from A0 and B0. Without its adapter such a model is R, which nobody ever meant: the initial policy is the
one with A0 and B0. Saved, the adapter is a plain one of twice the rank over W itself, as PEFT's own conversion
writes it: W + s·(B·A - B0·A0).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop.errors import ModelError
from prefloop.models.adapter import saved_pairs
from prefloop.models.sources import LoraOptions

# I and O features, R the rank.

ADAPTER = "adapter_model.safetensors"


class Factors(NamedTuple):
    """What was split off a weight."""

    a_RI: Tensor
    b_OR: Tensor


Split = Mapping[str, Factors]
"""By the name of the LoRA layer in the PeftModel."""


def split_of(model: PeftModel, lora: LoraOptions) -> Split:
    """The factors of a fresh adapter that PEFT has just split off. Raises ModelError where it cannot."""
    split = {}
    for name, layer in _layers(model):
        if "default" not in layer.lora_A:
            raise ModelError(
                f"model.lora.init_lora_weights {lora.init_lora_weights} splits linear layers only, and {name} is "
                "none; leave it out of model.lora.target_modules"
            )
        a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rank, smallest = layer.r["default"], min(layer.in_features, layer.out_features)
        if rank > smallest:
            raise ModelError(
                f"model.lora.init_lora_weights splits {rank} parts off {name}, whose smaller side has "
                f"{smallest}; lower model.lora.r, or its rank_pattern there"
            )
        if layer.fan_in_fan_out and lora.init_lora_weights == "olora":
            # PEFT takes the part off a weight that lies the other way round, without turning it.
            raise ModelError(
                f"model.lora.init_lora_weights olora does not fit {name}, whose weight lies transposed; take pissa"
            )
        split[name] = Factors(a_RI.detach().clone(), b_OR.detach().clone())
        weight = layer.get_base_layer().weight
        weight.data = weight.data.contiguous()
    return split


def saved_split(model: PeftModel, folder: Path) -> Split:
    """Open what `save_split` wrote over a model with a fresh plain adapter, and split the weights again.

    Raises ModelError for an adapter of other options, what safetensors and torch raise for one that is damaged or
    another model's.

    The factors are the saved ones, not computed anew, so that a resumed run has the very weights of an unbroken one.
    """
    tensors, split = load_file(folder / ADAPTER), {}
    with torch.no_grad():
        for name, layer in _layers(model):
            a, b, rank = f"{name}.lora_A.weight", f"{name}.lora_B.weight", layer.r["default"]
            if a not in tensors or b not in tensors:
                raise ModelError(
                    f"the adapter in {folder} has none at {name}; load it with its own recipe"
                )
            if tensors[a].shape[0] != 2 * rank or tensors[b].shape[1] != 2 * rank:
                raise ModelError(
                    f"the adapter in {folder} has rank {tensors[a].shape[0]} at {name}, and one that began as a "
                    f"part of the weights has twice model.lora.r ({2 * rank}); load it with its own recipe"
                )
            start = Factors(tensors[a][rank:].clone(), -tensors[b][:, rank:].contiguous())
            # PEFT's own formula, so that the rest has the same bits as in the unbroken run.
            part = layer.scaling["default"] * start.b_OR @ start.a_RI
            layer.get_base_layer().weight.data -= part.t() if layer.fan_in_fan_out else part
            tensors[a], tensors[b] = tensors[a][:rank], tensors[b][:, :rank]
            split[name] = start
    set_peft_model_state_dict(model, tensors)
    return split


def joined(name: str, tensor: Tensor, split: Split) -> Tensor:
    """A trained factor by its name in the PeftModel, with the one it began as: what is saved."""
    layer, _, factor = name.removesuffix(".weight").removesuffix(".default").rpartition(".")
    if layer not in split:
        return tensor
    a_RI, b_OR = (start.to(tensor.device) for start in split[layer])
    if factor == "lora_A":
        return torch.cat([tensor, a_RI])
    return torch.cat([tensor, -b_OR], dim=1)


def save_split(folder: Path, split: Split, lora: LoraOptions) -> None:
    """Make a plain adapter of what PEFT has saved in `folder`: one that changes W, not the rest of it."""
    tensors = load_file(folder / ADAPTER)
    both = {name: joined(name, tensor, split).contiguous() for name, tensor in tensors.items()}
    save_file(both, folder / ADAPTER, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # s is alpha / r, or alpha / sqrt(r): as large as before at twice the rank.
    times = 2**0.5 if lora.use_rslora else 2
    values |= {"init_lora_weights": True, "r": 2 * lora.r, "lora_alpha": times * lora.alpha}
    for key, factor in (("rank_pattern", 2), ("alpha_pattern", times)):
        values[key] = {part: factor * value for part, value in values[key].items()}
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def as_begun(model: PeftModel, split: Split) -> Iterator[None]:
    """Inside, the adapter is the one that training began with."""
    kept = []
    for name, start in split.items():
        layer: Any = model.get_submodule(name)
        for weight, first in (
            (layer.lora_A["default"].weight, start.a_RI),
            (layer.lora_B["default"].weight, start.b_OR),
        ):
            kept.append((weight, weight.data))
            weight.data = first.to(weight.device)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for original, trained in saved_pairs(module):
                kept.append((trained, trained.data))
                trained.data = original.data
    try:
        yield
    finally:
        for weight, data in kept:
            weight.data = data


def _layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
