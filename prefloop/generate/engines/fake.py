"""Answers without a model, to see a recipe's loop turn in seconds; for tests and measurements."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from prefloop.generate.engine import EngineContext, EngineOptions, Probe, Weights
from prefloop.records import Request, Response, Sampling, Scored, derive_seed

if TYPE_CHECKING:
    from prefloop.models.chat import Chat

_WORDS = "red blue seven river quiet paper under Monday stone light north bread".split()


def _babble(request: Request, seed: int, limit: int) -> str:
    draw = random.Random(derive_seed(seed, request.messages[-1].content, request.prefix))
    return " ".join(draw.choice(_WORDS) for _ in range(min(limit, draw.randint(3, 9)))) + "."


@lru_cache(maxsize=1024)
def _token_of(word: str) -> int:
    return derive_seed(word) % 50_000


class FakeEngine:
    """An Engine whose answers are a function of (request, seed); a token is a word."""

    def __init__(self, answer: Callable[[Request, int], str] | None = None) -> None:
        """`answer(request, seed)` replaces the built-in babble."""
        self._answer = answer

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """One response per request; greedy decoding ignores the seed."""
        responses = []
        for number, request in enumerate(requests):
            own = derive_seed(seed if sampling.temperature else 0, number)
            text = (
                self._answer(request, own)
                if self._answer
                else _babble(request, own, sampling.max_new_tokens)
            )
            ids = tuple(map(_token_of, text.split()))
            responses.append(Response(text=text, token_ids=(*ids, 0), mean_logprob=-1.0))
        return responses

    def score(
        self,
        requests: Sequence[Request],
        answers: Sequence[Response],
        *,
        top: int = 0,
        at: Sequence[Collection[int]] | None = None,
    ) -> list[Scored]:
        """Log-probs that depend on the word alone; alternatives come from a fixed list."""
        return [self._scored(answer, top) for answer in answers]

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Probabilities that depend on the request alone."""
        rows = []
        for request in requests:
            draw = random.Random(derive_seed(request.messages[-1].content))
            weights = [draw.random() + 0.01 for _ in options]
            rows.append(tuple(weight / sum(weights) for weight in weights))
        return rows

    def _scored(self, answer: Response, top: int) -> Scored:
        text = answer.text
        offsets, ids, place = [], [], 0
        for word in text.split():
            start = text.index(word, place)
            offsets.append((place, start + len(word)))
            ids.append(_token_of(word))
            place = start + len(word)
        if answer.finish == "stop":
            offsets.append((len(text), len(text)))
            ids.append(0)
        words = tuple(" " + word for word in _WORDS[:top])
        return Scored(
            token_ids=tuple(ids),
            offsets=tuple(offsets),
            logprobs=tuple(-0.1 - token % 7 / 10 for token in ids),
            top_texts=tuple(words for _ in ids) if top else (),
            top_logprobs=tuple(
                tuple(math.log(0.2) - n / 10 for n in range(len(words))) for _ in ids
            )
            if top
            else (),
        )


class Fake(EngineOptions):
    """Babble made from the prompt and the seed: for trying out a loop, not for learning anything."""

    def open(self, setting: EngineContext) -> _OpenFake:
        """Needs nothing."""
        return _OpenFake(setting.chat)


class _OpenFake(FakeEngine):
    """Its babble in the policy's tokens, as if the policy had sampled it: what comes after trains on them."""

    def __init__(self, chat: Chat) -> None:
        super().__init__()
        self._chat = chat

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """As FakeEngine, in the policy's tokens."""
        found = super().sample(requests, sampling, seed=seed, label=label)
        return [
            answer.model_copy(
                update={"token_ids": tuple(self._chat.completion_ids(ask.messages, answer.text))}
            )
            for ask, answer in zip(requests, found, strict=True)
        ]

    def load_weights(self, weights: Weights, probe: Probe) -> None:
        """Its answers are nobody's."""

    def offload(self) -> None:
        """It has nothing to give back."""

    def close(self) -> None:
        """It has started nothing."""
