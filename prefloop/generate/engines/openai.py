"""Any server with OpenAI's chat interface: a stronger model, or a baseline, that writes the answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

from prefloop.errors import ApiError, RecipeError
from prefloop.generate.api_client import Ask, ChatServer, Refused, Reply, ServerOptions
from prefloop.generate.engine import EngineContext, EngineOptions, Probe, Weights
from prefloop.machine import Bar
from prefloop.records import Request, Response, Sampling, Scored, derive_seed

log = logging.getLogger(__name__)

_NO_LOGPROBS = "a chat server tells no log-probabilities of given texts"


class OpenAI(EngineOptions, ServerOptions):
    """A model behind OpenAI's chat interface. It writes the answers of every round and is never trained."""

    plays_policy: ClassVar[bool] = False

    def check(self, *, tuning: str, lora_rank: int) -> None:
        """Whether the server answers and serves the model."""
        try:
            found = ChatServer(self.model_copy(update={"retries": 0})).models()
        except ApiError as error:
            raise RecipeError(f"section engine: {error}") from error
        if self.model not in found:
            raise RecipeError(
                f"engine.model: {self.url} serves no {self.model!r}; it serves {', '.join(found)}"
            )

    def open(self, setting: EngineContext) -> _OpenAIEngine:
        """Connects to nothing yet."""
        return _OpenAIEngine(ChatServer(self))


class _OpenAIEngine:
    """An OutsideEngine over a chat server. Conversations go out as text, in the server's own template."""

    def __init__(self, server: ChatServer) -> None:
        self._server = server

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """One response per request; one that the server refuses is empty, which gates count."""
        # A method that continues a begun answer asks for log-probs as well, which the check refuses.
        assert not any(request.prefix for request in requests)
        asks = [
            _ask(request, sampling, derive_seed(seed, place))
            for place, request in enumerate(requests)
        ]
        responses, refused = [Response(text="")] * len(asks), []
        with Bar(label, len(asks)) as bar:
            for place, reply in self._server.each(asks):
                if isinstance(reply, Refused):
                    refused.append(reply.detail)
                else:
                    responses[place] = _response(reply)
                bar.advance(items=1)
        if refused:
            url = self._server.options.url
            log.warning(
                "%s refused %d of %d prompts (%s)", url, len(refused), len(asks), refused[0]
            )
        return responses

    def score(
        self, requests: Sequence[Request], answers: Sequence[Response], *, top: int = 0
    ) -> list[Scored]:
        """Cannot be had."""
        raise NotImplementedError(_NO_LOGPROBS)

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Cannot be had."""
        raise NotImplementedError(_NO_LOGPROBS)

    def load_weights(self, weights: Weights, probe: Probe) -> None:
        """It serves its own."""

    def offload(self) -> None:
        """It holds no memory of this machine."""

    def close(self) -> None:
        """It has started nothing."""


def _ask(request: Request, sampling: Sampling, seed: int) -> Ask:
    """The request in OpenAI's words; what only some servers know goes along where it is switched on."""
    options = sampling.model_dump(mode="json", exclude_defaults=True)
    known = ("temperature", "top_p", "max_new_tokens")
    return Ask(
        messages=request.messages,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        # Several servers take 32 bits.
        seed=seed % 2**31,
        extra={key: value for key, value in options.items() if key not in known},
    )


def _response(reply: Reply) -> Response:
    return Response(
        text=reply.text.strip(), finish="length" if reply.finish == "length" else "stop"
    )
