"""What stops training at once: a loss that is not finite, a first loss that is not the known one.

Shape: B examples of a micro-batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prefloop.errors import TrainingError

# bf16 log-probs of a few hundred tokens carry about this much noise once multiplied by beta = 0.1.
_START_TOLERANCE = 0.1


def demand_finite(
    folder: Path,
    ids: Sequence[str],
    loss_B: Tensor,
    numbers: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Raise TrainingError where a loss is not finite; its example's (B,) `numbers` are left in `folder`."""
    bad = [n for n, finite in enumerate(torch.isfinite(loss_B).tolist()) if not finite]
    if not bad:
        return
    path = folder / "nonfinite.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in bad:
            row = {"pair": ids[n], "loss": loss_B[n].item()}
            found = {of: {r: v[n].item() for r, v in by.items()} for of, by in numbers.items()}
            file.write(json.dumps({**row, **found}) + "\n")
    names = ", ".join(ids[n] for n in bad)
    raise TrainingError(
        f"the loss of {names} is not finite (their log-probs are in {path}); "
        "lower train.lr or remove these prompts"
    )


def demand_known_start(folder: Path, expected: float | None, loss: float) -> None:
    """Raise TrainingError where the first step's loss is not the `expected` one; None expects nothing."""
    if expected is not None and abs(loss - expected) > _START_TOLERANCE * max(1.0, abs(expected)):
        raise TrainingError(
            f"the first loss is {loss:.4f} where the log-probs kept in {folder} give {expected:.4f}; "
            "they are not of this policy, delete that folder to compute them again"
        )
