"""Training state on disk: tensors as safetensors, the position as JSON; nothing is unpickled.

Tensors are saved whole, however many processes train; the random state is saved for each process.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefloop.errors import RunFolderError
from prefloop.manifest import hash_file, read_sealed, sealed
from prefloop.run_folder import METRICS

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
    """Write a file of tensors atomically, with its own hash."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"blake2b": _hash(tensors)})
    temporary.replace(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What `save_tensors` has written. RunFolderError where it is not as it was written."""
    remedy = f"delete {path.parent} to train anew from the last stage before it"
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = (file.metadata() or {}).get("blake2b")
    except (SafetensorError, UnicodeDecodeError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); {remedy}") from error
    if written != _hash(tensors):
        raise RunFolderError(f"{path} is not as it was written; {remedy}")
    return tensors


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def save_checkpoint(folder: Path, state: State, **position: Any) -> None:
    """Write a checkpoint named by the step in `position`, with the folder's metrics so far; then remove older ones."""
    final = folder / f"{_PREFIX}{position['step']:06d}"
    temporary = folder / f".{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_tensors(temporary / "weights.safetensors", state.weights)
    save_tensors(temporary / "optimizer.safetensors", state.optimizer)
    for rank, random in enumerate(state.random):
        save_tensors(temporary / f"random-{rank}.safetensors", random)
    metrics = folder / METRICS
    if metrics.exists():
        position |= {"metrics_bytes": metrics.stat().st_size, "metrics": hash_file(metrics)}
    (temporary / "position.json").write_text(sealed(position), encoding="utf-8")
    temporary.rename(final)
    for old in folder.glob(f"{_PREFIX}*"):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, ranks: int) -> tuple[State, dict[str, Any]] | None:
    """The newest checkpoint and its position; None where there is none.

    Raises RunFolderError where it or the metrics up to it have changed, and where another number of processes
    made it, as random states and the division of the examples would differ.
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
    position = read_sealed(newest / "position.json", f"delete {folder} to train the round anew")
    metrics, seal = folder / METRICS, position.pop("metrics", None)
    if seal and not (metrics.exists() and hash_file(metrics, position["metrics_bytes"]) == seal):
        raise RunFolderError(
            f"{metrics} is not as it was written; delete {folder} to train the round anew"
        )
    state = State(
        weights=load_tensors(newest / "weights.safetensors"),
        optimizer=load_tensors(newest / "optimizer.safetensors"),
        random=[load_tensors(path) for path in random_files],
    )
    return state, position


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
