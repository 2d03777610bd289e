"""Where a judge's own model is put, for judges that load one."""

from __future__ import annotations

from typing import Any

from prefloop.errors import JudgeError
from prefloop.models.sources import reason


def chosen_device(name: str) -> str:
    """The device itself; "auto" is a GPU where there is one."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def put_on(model: Any, device: str, called: str) -> None:
    """Move the model and set it to evaluation. JudgeError, which calls it `called`, where the device cannot be used."""
    try:
        model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise JudgeError(
            f"{called} cannot be put on device {device!r} ({reason(error)}); choose another judge.device"
        ) from error
