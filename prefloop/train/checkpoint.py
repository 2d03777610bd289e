"""Training state on disk: safetensors for every tensor, JSON for the position; nothing is ever unpickled.

Tensors are whole however many processes train; the random state is each process's own.
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
    """What training goes on from."""

    weights: dict[str, Tensor]
    """Trainable weights by name."""
    optimizer: dict[str, Tensor]
    """By "number of the parameter/name of the state"."""
    random: Sequence[dict[str, Tensor]]
    """`random_state` of each process, by rank."""


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of tensors so that it is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def save_checkpoint(folder: Path, state: State, **position: Any) -> None:
    """Write the state under the step in `position`; older ones go afterwards."""
    final = folder / f"{_PREFIX}{position['step']:06d}"
    part = folder / f".{final.name}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(state.weights, part / "weights.safetensors")
    save_file(state.optimizer, part / "optimizer.safetensors")
    for rank, random in enumerate(state.random):
        save_file(random, part / f"random-{rank}.safetensors")
    (part / "position.json").write_text(json.dumps(position), encoding="utf-8")
    part.rename(final)
    for old in folder.glob(f"{_PREFIX}*"):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, ranks: int) -> tuple[State, dict[str, Any]] | None:
    """The newest checkpoint and its position; None where there is none.

    Raises RunFolderError where another number of processes made it: their random states and shares of
    the work would not be the same.
    """
    found = sorted(folder.glob(f"{_PREFIX}*"))
    if not found:
        return None
    newest = found[-1]
    random = sorted(newest.glob("random-*"), key=lambda path: int(path.stem.partition("-")[2]))
    if len(random) != ranks:
        raise RunFolderError(
            f"{newest} was made by {len(random)} processes and cannot go on exactly with {ranks}; "
            f"launch {len(random)} again, or delete {folder} to train the round anew"
        )
    state = State(
        weights=load_file(newest / "weights.safetensors"),
        optimizer=load_file(newest / "optimizer.safetensors"),
        random=[load_file(path) for path in random],
    )
    return state, read_json(newest / "position.json")


def drop_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, once the policy that they led to is saved."""
    # Half-written ones begin with a dot.
    for old in folder.glob(f"*{_PREFIX}*"):
        shutil.rmtree(old)


def random_state() -> dict[str, Tensor]:
    """State of this process's generators of random numbers."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Take over what `random_state` gave, perhaps on another machine with other devices."""
    torch.set_rng_state(states["cpu"])
    for number in range(torch.cuda.device_count()):
        if (state := states.get(f"cuda{number}")) is not None:
            torch.cuda.set_rng_state(state, number)
