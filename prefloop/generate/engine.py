"""The door to every generator: what an engine is asked for and what it gives back.

Methods, judges and measures know only this protocol; hf_engine.py serves it in process,
fake_engine.py without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
