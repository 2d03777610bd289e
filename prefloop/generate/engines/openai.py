"""Any server with OpenAI's chat interface: a stronger model, or a baseline, that writes the answers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import model_validator

from prefloop.errors import ApiError, GenerationError, RecipeError
from prefloop.generate.api_client import Ask, ChatServer, Refused, Reply, ServerOptions
from prefloop.generate.engine import EngineContext, EngineOptions, Probe, Weights
from prefloop.machine import Bar
from prefloop.records import Request, Response, Sampling, Scored, derive_seed

log = logging.getLogger(__name__)

_NO_LOGPROBS = "a chat server tells no log-probabilities of given texts"


class OpenAI(EngineOptions, ServerOptions):
    """A model behind OpenAI's chat interface. It writes the answers of every round and is never trained."""

    plays_policy: ClassVar[bool] = False

    sampling_fields: Literal["all", "standard"] = "all"
    """all: every sampling value goes along, also those that are off and those that only servers such as vLLM and
    llama.cpp know (top_k, min_p, repetition_penalty), so that no server puts defaults of its model's in their
    place. standard: OpenAI's own fields only, for servers that refuse others, as OpenAI's does."""

    @model_validator(mode="after")
    def _openais_own_server_refuses_others(self) -> OpenAI:
        if self.sampling_fields == "all" and urlsplit(self.url).hostname == "api.openai.com":
            raise ValueError(
                "OpenAI's own server refuses requests with top_k, min_p or repetition_penalty; set "
                "engine.sampling_fields to standard"
            )
        return self

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
        return _OpenAIEngine(ChatServer(self), self.sampling_fields)


class _OpenAIEngine:
    """An OutsideEngine over a chat server. Conversations go out as text, in the server's own template."""

    def __init__(self, server: ChatServer, fields: Literal["all", "standard"]) -> None:
        self._server = server
        self._fields = fields

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """One response per request; one that the server refuses is empty, which gates count."""
        # A method that continues a begun answer asks for log-probs as well, which the check refuses.
        assert not any(request.prefix for request in requests)
        asks = [
            _ask(request, sampling, derive_seed(seed, place), self._fields)
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
        self,
        requests: Sequence[Request],
        answers: Sequence[Response],
        *,
        top: int = 0,
        at: Sequence[Collection[int]] | None = None,
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


def _ask(
    request: Request, sampling: Sampling, seed: int, fields: Literal["all", "standard"]
) -> Ask:
    """The request in OpenAI's words; values that are off are said too, for a server has defaults of its own."""
    extra: dict[str, Any] = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    if sampling.stop:
        extra["stop"] = list(sampling.stop)
    if fields == "all":
        # vLLM's and llama.cpp's words for the same penalty; each passes over the other's.
        penalties = {"repetition_penalty": 1.0, "repeat_penalty": 1.0}
        extra |= {"top_k": sampling.top_k, "min_p": sampling.min_p, **penalties}
    elif sampling.top_k or sampling.min_p:
        raise GenerationError(
            "engine.sampling_fields: standard cannot send top_k and min_p; leave them out of the "
            "recipe's sampling, or set engine.sampling_fields to all where the server knows them"
        )
    return Ask(
        messages=request.messages,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        # Several servers take 32 bits.
        seed=seed % 2**31,
        extra=extra,
    )


def _response(reply: Reply) -> Response:
    return Response(
        text=reply.text.strip(),
        reasoning=reply.reasoning,
        finish="length" if reply.finish == "length" else "stop",
    )
