"""The door to every generator: what an engine is asked for and what it gives back.

Methods, judges and measures know only this protocol; hf_engine.py serves it in process,
fake_engine.py without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from prefloop.records import Request, Response, Sampling, Scored


class Engine(Protocol):
    """Anything that continues and scores conversations under one policy."""

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """One response per request, in their order; `seed` fixes all, `label` names the progress bar."""
        ...

    def score(
        self, requests: Sequence[Request], answers: Sequence[str], *, top: int = 0
    ) -> list[Scored]:
        """Log-probability of each given answer; `top` asks for that many alternatives a position."""
        ...

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Probability of each option as the next token, renormalised over the options; a row a request."""
        ...


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
