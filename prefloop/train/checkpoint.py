"""Training state on disk: safetensors for every tensor, JSON for the position; nothing is ever unpickled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prefloop.records import read_json

_PREFIX = "checkpoint-"


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimiser's state, by parameter number and name of the state."""
    save_file(_optimizer_tensors(optimizer), path)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Read what `save_optimizer` wrote into an optimiser over the same parameters."""
    _set_optimizer(optimizer, load_file(path))


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **position: Any
) -> None:
    """Write weights, optimiser and random state under the step in `position`; older ones go afterwards."""
    final = folder / f"{_PREFIX}{position['step']:06d}"
    part = folder / f".{final.name}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    save_file(weights, part / "weights.safetensors")
    save_optimizer(part / "optimizer.safetensors", optimizer)
    save_file(_random_state(), part / "random.safetensors")
    (part / "position.json").write_text(json.dumps(position), encoding="utf-8")
    part.rename(final)
    for old in folder.glob(f"{_PREFIX}*"):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore the newest checkpoint and return its position; None where there is none."""
    found = sorted(folder.glob(f"{_PREFIX}*"))
    if not found:
        return None
    weights = load_file(found[-1] / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    load_optimizer(found[-1] / "optimizer.safetensors", optimizer)
    _set_random_state(load_file(found[-1] / "random.safetensors"))
    return read_json(found[-1] / "position.json")


def drop_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, once the policy that they led to is saved."""
    # Half-written ones begin with a dot.
    for old in folder.glob(f"*{_PREFIX}*"):
        shutil.rmtree(old)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{number}/{key}": value.detach().clone()
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def _set_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    current = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for path, tensor in tensors.items():
        number, key = path.split("/", 1)
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def _random_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for number in range(torch.cuda.device_count()):
        torch.cuda.set_rng_state(states[f"cuda{number}"], number)
