"""Questions to a server with OpenAI's chat interface: vLLM, llama.cpp's server, a provider.

Requests run side by side, are paced, and are repeated with growing pauses (Retry-After is obeyed). They are
sent by the `openai` package, which is imported when a server is opened, over bounded connections
(bounded_http.py). The key comes from the environment and goes into the request's header, nowhere else.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from prefloop.config import Options
from prefloop.errors import ApiError
from prefloop.records import Message

T = TypeVar("T")


class ServerOptions(Options):
    """Which server is asked for which model, and how hard."""

    url: str = Field(pattern=r"^https?://\S+$")
    """The server's address up to its version, such as http://127.0.0.1:8000/v1."""
    model: str
    """The name by which the server knows the model."""
    key_env: str | None = None
    """Environment variable that holds the key; null for a server that asks for none. The key is never written."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests under way at a time."""
    requests_per_minute: float | None = Field(default=None, gt=0.0)
    """Requests begun in a minute at most, repeated ones included; null sets no limit."""
    timeout: float = Field(default=120.0, gt=0.0)
    """Seconds that one attempt may take, from connecting to the last byte."""
    retries: int = Field(default=8, ge=0)
    """Further attempts when the server is away, overloaded or too slow: pauses from 0.5 s, doubled up to 8 s."""
    longest_pause: float = Field(default=600.0, ge=0.0)
    """Seconds to wait at most where the server names a time (Retry-After); one that names more is given up."""
    max_reply_mb: float = Field(default=64.0, gt=0.0)
    """Largest reply (MiB) that is read."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            good = bool(parts.hostname) and parts.port != 0 and url.isascii()
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"{url!r} is no address; write it as http://HOST:PORT/v1")
        return url


@dataclass(frozen=True)
class Ask:
    """One chat completion to be asked for."""

    messages: Sequence[Message]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None
    """That many likeliest tokens with their log-probs at each position; None asks for no log-probs."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request's body, OpenAI's or the server's own (stop, top_k, min_p ...)."""

    def body(self, model: str) -> dict[str, Any]:
        """The request as the server gets it."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": m.role, "content": m.content} for m in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        if self.seed is not None:
            body["seed"] = self.seed
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {**body, **self.extra}


@dataclass(frozen=True)
class Token:
    """A sampled token and the likeliest ones in its place, as (text, log-prob in nats) where asked for."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Reply:
    """What the server answered."""

    text: str
    finish: str
    """The server's finish_reason: "stop", "length" ..."""
    tokens: tuple[Token, ...] = ()
    """Empty where log-probs were not asked for, or are not offered."""
    reasoning: str = ""
    """What the model thought, where the server keeps it apart."""


@dataclass(frozen=True)
class Refused:
    """The server will not answer this one request (too long, filtered, ...); others may well be answered."""

    detail: str
    malformed: bool = False
    """It has answered, in a form that cannot be read."""


class ChatServer:
    """An open connection to one server."""

    def __init__(self, options: ServerOptions) -> None:
        """ApiError where the package `openai` or the key's variable is missing; connects to nothing yet."""
        self.options = options
        self._key = demand_client(options)
        import openai

        self._openai = openai
        from prefloop.generate import bounded_http

        self._bounded = bounded_http
        self._pace = _Pace(options.requests_per_minute)
        http = bounded_http.client(options.timeout, int(options.max_reply_mb * 2**20), options.url)
        self._client = openai.OpenAI(
            base_url=options.url,
            # The package insists on a key, and would look for OPENAI_API_KEY, which nobody named here.
            api_key=self._key or "none",
            # Retries are made here: the package gives up, or waits at its will, where a server names a long time.
            max_retries=0,
            timeout=options.timeout,
            http_client=http,
        )
        weakref.finalize(self, http.close)

    def models(self) -> list[str]:
        """Names of the models that the server says it serves. ApiError where it cannot be asked."""
        try:
            return [str(model.id) for model in self._tried(self._client.models.list)]
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise self._failure(error) from error

    def complete(self, ask: Ask) -> Reply | Refused:
        """Ask once (with retries). ApiError where asking anything else would fail too."""
        body = ask.body(self.options.model)
        try:
            completion = self._tried(
                lambda: self._client.post("/chat/completions", cast_to=object, body=body)
            )
            return _reply(completion, self._key)
        except _RefusedError as refused:
            return Refused(str(refused))
        except RecursionError:
            return Refused("the reply is nested too deeply", malformed=True)
        except _MalformedError as error:
            return Refused(str(error), malformed=True)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._failure(error) from error

    def _tried(self, ask: Callable[[], T]) -> T:
        """Ask until it works, `retries` times more at most. ApiError or _RefusedError where it does not."""
        for attempt in range(1, self.options.retries + 2):
            self._pace.wait()
            try:
                return ask()
            except (self._openai.OpenAIError, self._bounded.Refusal) as error:
                status = getattr(error, "status_code", None)
                passing = status is None or status in (408, 409, 429) or status >= 500
                hopeless = self._bounded.refusal(error) is not None
                wait = _retry_after(error)
                last = attempt > self.options.retries or (wait or 0) > self.options.longest_pause
                if passing and not hopeless and not last:
                    time.sleep(min(8.0, 0.5 * 2 ** (attempt - 1)) if wait is None else wait)
                    continue
                # 500 is how several servers say that this one request broke them.
                if status in (400, 413, 422, 500):
                    raise _RefusedError(f"status {status}: {self._words(error)}") from error
                raise self._failure(error, attempt, wait) from error
        raise AssertionError("the last attempt returns or raises")

    def each(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply | Refused]]:
        """Ask all, `concurrency` at a time; yields (position, answer) as the answers come.

        On an ApiError nothing new is asked; what was under way is still yielded before it is raised.
        """
        first_error: ApiError | None = None
        stopped = threading.Event()

        def work(ask: Ask) -> Reply | Refused | None:
            return None if stopped.is_set() else self.complete(ask)

        pool = ThreadPoolExecutor(self.options.concurrency, thread_name_prefix="chat")
        try:
            places: dict[Future[Reply | Refused | None], int] = {
                pool.submit(work, ask): place for place, ask in enumerate(asks)
            }
            for future in as_completed(places):
                try:
                    answer = future.result()
                except ApiError as error:
                    stopped.set()
                    first_error = first_error or error
                    continue
                if answer is not None:
                    yield places[future], answer
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
        if first_error is not None:
            raise first_error

    def _words(self, error: BaseException) -> str:
        """The server's own words, on one line, without the key."""
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        line = " ".join(str(said or error).split())[:200].rstrip(".")
        return line.replace(self._key, "[key]") if self._key else line

    def _failure(
        self, error: BaseException, attempt: int = 1, wait: float | None = None
    ) -> ApiError:
        """What stands between us and the server, in one sentence with a remedy."""
        url, status = self.options.url, getattr(error, "status_code", None)
        attempts = f"after {attempt} attempt{'s' * (attempt > 1)}"
        if (refusal := self._bounded.refusal(error)) is not None:
            return ApiError(f"{url} {refusal}")
        if wait is not None and wait > self.options.longest_pause:
            return ApiError(
                f"{url} asks to wait {wait:,.0f} s (status {status}, {attempts}), and longest_pause is "
                f"{self.options.longest_pause:,.0f} s; raise it, or run the same command later"
            )
        if isinstance(error, self._openai.APITimeoutError):
            return ApiError(
                f"{url} did not answer within {self.options.timeout:g} s {attempts}; "
                "raise timeout, or lower concurrency"
            )
        if isinstance(error, self._openai.APIConnectionError):
            return ApiError(
                f"{url} cannot be reached {attempts}; start the server, or correct url; "
                "the same command then goes on"
            )
        if status in (401, 403):
            where = f"the key in {self.options.key_env}" if self._key else "a request without a key"
            return ApiError(f"{url} refuses {where} (status {status}); name the right key_env")
        if status == 404:
            return ApiError(
                f"{url} has no model {self.options.model!r}, or no chat at this address "
                f"({self._words(error)}); correct model, or url, which usually ends in /v1"
            )
        if status == 429:
            return ApiError(
                f"{url} accepts no more requests {attempts} ({self._words(error)}); "
                "lower concurrency or requests_per_minute"
            )
        if status is not None:
            return ApiError(
                f"{url} fails with status {status} {attempts} ({self._words(error)}); "
                "see the server's log; the same command then goes on"
            )
        return ApiError(
            f"{url} does not answer as OpenAI's interface does ({type(error).__name__}: "
            f"{self._words(error)}); correct url, which usually ends in /v1"
        )


class _Pace:
    """Lets requests begin no faster than so many a minute, evenly spaced."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._free = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until this request's turn."""
        if not self._gap:
            return
        with self._lock:
            turn = max(self._free, time.monotonic())
            self._free = turn + self._gap
        time.sleep(max(0.0, turn - time.monotonic()))


def demand_client(options: ServerOptions) -> str | None:
    """The key, if one is named; ApiError where its variable or the package `openai` is missing."""
    if find_spec("openai") is None:
        raise ApiError("asking a server needs the package openai; pip install 'prefloop[api]'")
    if options.key_env is None:
        return None
    key = os.environ.get(options.key_env, "").strip()
    if not key:
        raise ApiError(
            f"key_env names the environment variable {options.key_env}, which is not set; export it"
        )
    return key


class _RefusedError(Exception):
    """The server refuses this request."""


class _MalformedError(Exception):
    """The reply has the right form and cannot be used."""


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait, as a number or a date; None where it names no time."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _reply(completion: Any, key: str | None) -> Reply:
    """Read the fields that every server has; AttributeError, LookupError, TypeError or ValueError where one is missing.

    Raises _MalformedError for a text or log-probs that cannot be used. A key that the server echoes is masked.
    """
    if isinstance(completion, str):  # how the client hands on what is not called application/json
        completion = json.loads(completion)
    if key:
        completion = json.loads(json.dumps(completion).replace(json.dumps(key)[1:-1], "[key]"))
    choice = completion["choices"][0]
    message = choice["message"]
    text = message.get("content")
    if text is None:  # some models refuse in a field of its own, or only think
        text = message.get("refusal") or ""
    if not isinstance(text, str):
        raise TypeError(f"message.content is of type {type(text).__name__}")
    try:
        logprobs = (choice.get("logprobs") or {}).get("content") or ()
        tokens = tuple(map(_token, logprobs))
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise _MalformedError(f"its log-probs cannot be read ({error})") from error
    # vLLM's name and that of most others.
    thought = str(message.get("reasoning") or message.get("reasoning_content") or "")
    finish = str(choice.get("finish_reason"))
    try:
        f"{text}{thought}{finish}".encode()
    except UnicodeEncodeError as error:
        raise _MalformedError(f"the text holds half a character ({error.reason})") from error
    return Reply(text, finish, tokens, thought)


def _token(entry: Mapping[str, Any]) -> Token:
    top = entry.get("top_logprobs") or ()
    return Token(
        str(entry["token"]),
        _logprob(entry["logprob"]),
        tuple((str(one["token"]), _logprob(one["logprob"])) for one in top),
    )


def _logprob(value: Any) -> float:
    """A log-probability; ValueError for a number that is none. Servers round a little above 0, and send -inf."""
    number = float(value)
    if not number <= 1e-3:
        raise ValueError(f"{number} is no log-probability")
    return min(number, 0.0)
