"""The door to every generator: what an engine is asked for and what it gives back.

Methods, judges and measures know only this protocol; hf_engine.py serves it in process,
fake_engine.py without a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from prefloop.config import Options
from prefloop.records import Request, Response, Sampling, Scored

if TYPE_CHECKING:
    from prefloop.models.chat import Chat


class Engine(Protocol):
    """Anything that continues and scores conversations under one policy."""

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """One response per request, in their order; `seed` fixes all, `label` names the progress bar."""
        ...

    def score(
        self,
        requests: Sequence[Request],
        answers: Sequence[Response],
        *,
        top: int = 0,
        at: Sequence[Collection[int]] | None = None,
    ) -> list[Scored]:
        """Log-probability of each given answer: of the tokens that the policy sampled, else of the text's.

        An answer whose `finish` is "length" has no end token. `top` asks for that many alternatives a position.
        `at`: characters of each answer. Only tokens that begin there, spaces aside, need be scored; the log-probs of
        others may be NaN, and they may have no alternatives.
        """
        ...

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Probability of each option as the next token at temperature 1, a row a request.

        A row adds up to less than 1 where the model might say something else (`among` renormalises).
        """
        ...


MIN_MASS = 0.01
"""Options with less probability together are not what the model would say. Asked with the shipped questions,
SmolLM2-135M gives its ratings 0.04 to 0.33; one that is about to write `<think>` gives them 1e-6 or less."""


def among(row: Sequence[float], min_mass: float) -> tuple[float, ...] | None:
    """The options' probabilities renormalised to 1; None where together they have less than `min_mass`."""
    mass = math.fsum(row)
    return None if mass < min_mass else tuple(p / mass if mass else math.nan for p in row)


class TokenScores(NamedTuple):
    """Given tokens under a model."""

    logprobs: list[float]
    """Of each token, in nats, at temperature 1."""
    likeliest: list[bool]
    """Whether it is the one that greedy decoding would have taken."""
    top_ids: list[list[int]]
    """The likeliest tokens at each position, likeliest first; empty where none were asked for."""
    top_logprobs: list[list[float]]


class TokenEngine(Protocol):
    """An engine whose model is in this process: it takes tokens as they stand, without a chat template."""

    def continue_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        label: str = "generate",
    ) -> list[list[int]]:
        """What follows each prompt, the token that ended it included.

        It ends where `generate` of transformers would: at the tokens that the model's generation config
        names, and at `sampling.stop`, in a text that shows special tokens.
        """
        ...

    def score_tokens(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[TokenScores]:
        """Scores of each row's tokens from its start on; `starts` are at least 1."""
        ...


@dataclass(frozen=True)
class Weights:
    """Where a policy lies on disk."""

    model: Path
    """Folder of a whole model."""
    adapter: Path | None = None
    """Folder of a LoRA adapter over it."""


@dataclass(frozen=True)
class EngineContext:
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
    lora_others: tuple[str, ...] = ()
    """What else the adapter changes: parameters that are no module's own, such as fused experts, and whole modules."""


Probe = Callable[[], Sequence[float]]
"""Log-probs of the probe's tokens under the trainer's model."""


class OutsideEngine(Engine, Protocol):
    """An engine that is not this process: it must be told whose weights to answer with."""

    def load_weights(self, weights: Weights, probe: Probe) -> None:
        """Answer with these weights from now on; GenerationError unless it truly does."""
        ...

    def offload(self) -> None:
        """Before training: give back memory that the trainer may need."""
        ...

    def close(self) -> None:
        """End whatever was started, however the run ends."""
        ...


class EngineOptions(Options):
    """An engine's fields are its options; `open` puts it to work."""

    plays_policy: ClassVar[bool] = True
    """Whether it answers as the policy does. False: as some other model, which nobody can ask for log-probs."""

    def check(self, *, tuning: str, lora_rank: int) -> None:
        """Before a run: RecipeError where the engine could not be opened."""

    def open(self, setting: EngineContext) -> OutsideEngine | None:
        """The engine at work; None stands for this process and the model that is being trained."""
        raise NotImplementedError
