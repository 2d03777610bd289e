"""An engine that counts what it is asked for, so that a run knows what its generation cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from prefloop.generate.engine import Engine
from prefloop.models.chat import Chat
from prefloop.records import Request, Response, Sampling, Scored

GENERATED = "generated_tokens"
READ = "read_tokens"


class Metered:
    """An Engine that adds to `counts` what passes through it: tokens drawn, and tokens read.

    Read are the tokens of every prompt, and of every answer that is scored; each time they are asked for,
    whether or not the engine still has them in memory.
    """

    def __init__(self, engine: Engine, chat: Chat, counts: Counter[str]) -> None:
        self._engine = engine
        self._chat = chat
        self._counts = counts

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """As the engine does; counted."""
        responses = self._engine.sample(requests, sampling, seed=seed, label=label)
        self._counts[GENERATED] += sum(len(response.token_ids) for response in responses)
        self._read(requests)
        return responses

    def score(
        self, requests: Sequence[Request], answers: Sequence[str], *, top: int = 0
    ) -> list[Scored]:
        """As the engine does; counted."""
        found = self._engine.score(requests, answers, top=top)
        self._counts[READ] += sum(len(scored.token_ids) for scored in found)
        self._read(requests)
        return found

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """As the engine does; counted."""
        rows = self._engine.choose(requests, options)
        self._read(requests)
        return rows

    def _read(self, requests: Sequence[Request]) -> None:
        for request in requests:
            prefix = self._chat.text_ids(request.prefix) if request.prefix else []
            self._counts[READ] += len(self._chat.prompt_ids(request.messages)) + len(prefix)
