"""What the parts of on_gpu.py share: where findings are noted, the sizes of a run, precision."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ways.steps import draw_groups

from prefloop.models.policy import Policy
from prefloop.train import logprobs
from prefloop.train.packing import TokenGroup

FLOAT32_LIMIT = 1e-4
"""float32: largest difference of a log-prob in nats, and of the gradient relative to its length."""
LOSS_LIMIT = 0.05
"""bfloat16: how far the losses of two ways may lie apart, as rounding of a few hundred tokens times beta."""


class Notes:
    """A part's findings, on disk after each, so that what stops it late takes nothing away."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = {"figures": {}, "checks": {}}

    def figure(self, name: str, value: Any) -> None:
        """Something measured."""
        self.found["figures"][name] = value
        self._write()

    def check(
        self, name: str, value: float, *, most: float | None = None, least: float = 0.0
    ) -> None:
        """A number that should be at most `most`, or at least `least`."""
        good = value <= most if most is not None else value >= least
        limit = {"most": most} if most is not None else {"least": least}
        seen = value if math.isfinite(value) else None
        self.found["checks"][name] = {"value": seen, **limit, "good": good}
        self._write()

    def fail(self, message: str) -> None:
        """Why the part did not come to its end."""
        self.found["failure"] = message
        self._write()

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.found))
        part.replace(self._path)


@dataclass(frozen=True)
class Form:
    """The sizes of a run: for a GPU, or small for a CPU."""

    device: str
    small: bool

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def shape(self, large: bool) -> str:
        """A shape of `random_models`."""
        return "tiny" if self.small else "1.7b" if large else "135m"

    def groups(self, case: str, count: int, seed: int, vocabulary: int) -> list[TokenGroup]:
        """`draw_groups`, in the small form every fifth token, so that answers share as much as before."""
        drawn = draw_groups(case, count, vocabulary, seed)
        if not self.small:
            return drawn
        return [TokenGroup(g.prompt[::5], tuple(c[::5] for c in g.completions)) for g in drawn]

    @contextmanager
    def masks(self) -> Iterator[None]:
        """Inside, a CPU attends with the mask that a GPU gets."""
        with patch.dict(logprobs._MASKS, sdpa=logprobs._bool_mask):
            yield


def autocast(policy: Policy) -> AbstractContextManager[Any]:
    """The trainer's precision: bfloat16 products where the model is in bfloat16."""
    half = policy.model.dtype == torch.bfloat16
    return torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=half)
