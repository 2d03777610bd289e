"""Training state on disk: tensors as safetensors, the position as JSON; nothing is unpickled.

Tensors are saved whole, however many processes train; the random state is saved for each process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop.errors import RunFolderError
from prefloop.records import read_json

_PREFIX = "checkpoint-"


class State(NamedTuple):
    """The state from which training continues."""

    weights: dict[str, Tensor]
    """Trainable weights by name."""
    optimizer: dict[str, Tensor]
    """Optimiser state by "index of the parameter/name of the state"."""
    random: Sequence[dict[str, Tensor]]
    """`random_state` of each process, by rank."""


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of tensors atomically."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def save_checkpoint(folder: Path, state: State, **position: Any) -> None:
    """Write a checkpoint named by the step in `position`, then remove older ones."""
    final = folder / f"{_PREFIX}{position['step']:06d}"
    temporary = folder / f".{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(state.weights, temporary / "weights.safetensors")
    save_file(state.optimizer, temporary / "optimizer.safetensors")
    for rank, random in enumerate(state.random):
        save_file(random, temporary / f"random-{rank}.safetensors")
    (temporary / "position.json").write_text(json.dumps(position), encoding="utf-8")
    temporary.rename(final)
    for old in folder.glob(f"{_PREFIX}*"):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, ranks: int) -> tuple[State, dict[str, Any]] | None:
    """The newest checkpoint and its position; None where there is none.

    Raises RunFolderError where another number of processes made it, as random states and the division of the
    examples would differ.
    """
    checkpoints = sorted(folder.glob(f"{_PREFIX}*"))
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    random_files = sorted(
        newest.glob("random-*"), key=lambda path: int(path.stem.partition("-")[2])
    )
    if len(random_files) != ranks:
        raise RunFolderError(
            f"{newest} was made by {len(random_files)} processes and cannot go on exactly with {ranks}; "
            f"launch {len(random_files)} again, or delete {folder} to train the round anew"
        )
    state = State(
        weights=load_file(newest / "weights.safetensors"),
        optimizer=load_file(newest / "optimizer.safetensors"),
        random=[load_file(path) for path in random_files],
    )
    return state, read_json(newest / "position.json")


def drop_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, once the policy that they led to is saved."""
    # Names of incomplete ones begin with a dot.
    for old in folder.glob(f"*{_PREFIX}*"):
        shutil.rmtree(old)


def random_state() -> dict[str, Tensor]:
    """State of this process's random number generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Restore what `random_state` returned; devices that this machine lacks are ignored."""
    torch.set_rng_state(states["cpu"])
    for device in range(torch.cuda.device_count()):
        if (state := states.get(f"cuda{device}")) is not None:
            torch.cuda.set_rng_state(state, device)
