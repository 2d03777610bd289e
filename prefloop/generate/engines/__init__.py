"""Who writes the answers: one file per engine, found by file name; a new file needs no list edited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from prefloop.generate.engine import Engine

if TYPE_CHECKING:
    from prefloop.models.chat import Chat


@dataclass(frozen=True)
class Weights:
    """Where a policy lies on disk."""

    model: Path
    """Folder of a whole model."""
    adapter: Path | None = None
    """Folder of a LoRA adapter over it."""


@dataclass(frozen=True)
class Setting:
    """What an engine must know of the run that it is opened for."""

    chat: Chat
    """The policy's tokenizer and chat template."""
    dtype: str
    """Of the policy's weights: "float32" or "bfloat16"."""
    lora_rank: int | None
    """null: all weights are trained."""
    lora_modules: tuple[str, ...]
    """Last names of the modules that the adapter changes, such as q_proj."""
    trust_remote_code: bool
    log: Path
    """Where a program of the engine's writes what it says."""


Probe = Callable[[], Sequence[float]]
"""Log-probs of the probe's tokens under the trainer's model."""


class OutsideEngine(Engine, Protocol):
    """An engine that is not this process: it must be told whose weights to answer with."""

    def serve(self, weights: Weights, probe: Probe) -> None:
        """Answer with these weights from now on; GenerationError unless it truly does."""
        ...

    def rest(self) -> None:
        """Before training: give back memory that the trainer may need."""
        ...

    def close(self) -> None:
        """End whatever was started, however the run ends."""
        ...


class EngineOptions(BaseModel):
    """An engine's fields are its options; `open` puts it to work."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    plays_policy: ClassVar[bool] = True
    """Whether it answers as the policy does. False: as some other model, which nobody can ask for log-probs."""

    def check(self, *, tuning: str, lora_rank: int) -> None:
        """Before a run: RecipeError where the engine could not be opened."""

    def open(self, setting: Setting) -> OutsideEngine | None:
        """The engine at work; None stands for this process and the model that is being trained."""
        raise NotImplementedError
