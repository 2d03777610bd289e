"""A vLLM server and the way to it: started on a leash and reached over a socket in a private folder, or by URL."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal

from prefloop.errors import GenerationError
from prefloop.generate.supervisor import GRACE, kill
from prefloop.machine import Bar

Body = Mapping[str, Any]
T = TypeVar("T")

_GOES_ON = "the same command goes on where the run stopped"
_POLL = 0.25
_SAYS = re.compile(r"\b[A-Za-z.]*(?:Error|Exception|error)\b.*?: .+")


class Refusal(Exception):
    """The server's own words on a request that it will not serve."""


class Server:
    """One server, ours or somebody's; the functions that ask raise GenerationError where it is gone."""

    def __init__(self, url: str | None, log: Path, *, concurrency: int, timeout: float) -> None:
        """Connects to nothing yet. `timeout` is what one answer may take, in seconds."""
        self._url = url
        self._log = log
        self._concurrency = concurrency
        self._timeout = httpx2.Timeout(timeout, connect=30.0, pool=None)
        self._leash: subprocess.Popen[str] | None = None
        self._group = 0
        self._said = 0
        """Size of the log when this server was started."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    # Start and end.

    def start(self, command: Sequence[str], timeout: float) -> None:
        """Start a server and wait until it answers; the command lacks only where to listen."""
        self.stop()
        # A socket's path may have 107 bytes, which a run's folder soon exceeds.
        self._folder = tempfile.TemporaryDirectory(prefix="prefloop-")
        self._said = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._leash = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "prefloop.generate.supervisor",
                    *command,
                    "--uds",
                    self._socket,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
                text=True,
                start_new_session=True,
            )
        assert self._leash.stdout is not None
        self._group = int(self._leash.stdout.readline() or 0)
        deadline = time.monotonic() + timeout
        with Bar("starting vLLM", 0):
            while not self._answers():
                if self._leash.poll() is not None:
                    raise GenerationError(
                        f"vLLM could not be started: {self._last_words()}; all it said is in {self._log}"
                    )
                if time.monotonic() > deadline:
                    self.stop()
                    raise GenerationError(
                        f"vLLM was not ready within {timeout:g} s; see {self._log}, "
                        "or raise engine.start_timeout"
                    )
                time.sleep(_POLL)

    def stop(self) -> None:
        """End the server that was started here, and all that it started; nothing where none was."""
        leash, self._leash = self._leash, None
        if leash is None or self._folder is None:
            return
        self._folder.cleanup()
        assert leash.stdin is not None
        leash.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            leash.wait(GRACE + 5)
        # Nothing is left to kill, unless somebody killed the leash.
        leash.kill()
        leash.wait()
        if self._group:
            kill(self._group)
        assert leash.stdout is not None
        leash.stdout.close()

    # Questions.

    def ask(self, path: str, body: Body) -> Any:
        """One question. Raises Refusal where the server will not answer it."""
        (answer,) = self.ask_all(path, [body], lambda answer: None)
        return answer

    def ask_all(self, path: str, bodies: Sequence[Body], each: Callable[[Any], None]) -> list[Any]:
        """All questions side by side; `each` gets the answers as they come, the result has them in order."""
        answers: list[Any] = [None] * len(bodies)
        failures: list[Refusal | httpx2.HTTPError] = []

        async def work() -> None:
            limit = anyio.CapacityLimiter(self._concurrency)
            async with self._client() as client, anyio.create_task_group() as group:

                async def one(place: int) -> None:
                    async with limit:
                        if failures:
                            return
                        try:
                            answer = _answer(await client.post(path, json=bodies[place]))
                        except (Refusal, httpx2.HTTPError) as error:
                            failures.append(error)
                            return
                    answers[place] = answer
                    each(answer)

                for place in range(len(bodies)):
                    group.start_soon(one, place)

        _run(work)
        for first in failures:
            raise self._failure(first) if isinstance(first, httpx2.HTTPError) else first
        return answers

    def _client(self) -> httpx2.AsyncClient:
        uds = self._socket if self._url is None else None
        limits = httpx2.Limits(max_connections=self._concurrency)
        return httpx2.AsyncClient(
            base_url=self._url or "http://localhost",
            transport=httpx2.AsyncHTTPTransport(uds=uds, limits=limits),
            timeout=self._timeout,
        )

    @property
    def _socket(self) -> str:
        assert self._folder is not None
        return str(Path(self._folder.name) / "socket")

    def _answers(self) -> bool:
        async def work() -> bool:
            async with self._client() as client:
                return (await client.get("/health", timeout=5.0)).is_success

        with contextlib.suppress(httpx2.HTTPError):
            return _run(work)
        return False

    # What went wrong, in words.

    def _failure(self, error: httpx2.HTTPError) -> GenerationError:
        if isinstance(error, httpx2.ReadTimeout):
            return GenerationError(
                f"vLLM gave no answer within {self._timeout.read:g} s; see its log, lower "
                f"engine.max_num_seqs or raise engine.answer_timeout; {_GOES_ON}"
            )
        if self._url is not None:
            return GenerationError(
                f"the vLLM server at {self._url} is gone or failing ({_words(error)}); start it again, "
                f"then {_GOES_ON}"
            )
        # A server whose engine was killed notices a little later than we do.
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._leash.wait(GRACE) if self._leash else 0
            how = f"was killed by {signal.Signals(code - 128).name}" if code > 128 else "died"
            return GenerationError(
                f"vLLM {how} (its last words: {self._last_words()}; all of them are in {self._log}); "
                f"{_GOES_ON}"
            )
        return GenerationError(f"vLLM fails ({_words(error)}); see {self._log}; {_GOES_ON}")

    def _last_words(self) -> str:
        """The last line of the log that names an error, else the last line."""
        with self._log.open("rb") as file:
            file.seek(self._said)
            lines = file.read().decode(errors="replace").split("\n")
        errors = [found.group() for line in lines if (found := _SAYS.search(line))]
        said = [line for line in lines if line.strip()]
        return (errors or said or ["nothing"])[-1].strip()[:300].rstrip(".")


def _run(work: Callable[[], Awaitable[T]]) -> T:
    """In a thread of its own: a notebook's loop would be in the way, and Ctrl-C must get through."""
    with start_blocking_portal() as portal:
        return portal.call(work)


def _answer(response: httpx2.Response) -> Any:
    """The body of an answer. Refusal for what no other attempt would change, HTTPError for the rest."""
    if response.status_code in (400, 404, 413, 422):
        raise Refusal(_message(response))
    response.raise_for_status()
    if "json" not in response.headers.get("content-type", ""):
        return response.text
    try:
        return response.json()
    except ValueError:
        raise httpx2.DecodingError("its answer is damaged", request=response.request) from None


def _message(response: httpx2.Response) -> str:
    try:
        body = response.json()
        said = body.get("error", {}).get("message") or body.get("message") or body.get("detail")
    except (ValueError, AttributeError):
        said = None
    return " ".join(str(said or f"status {response.status_code}").split())[:300].rstrip(".")


def _words(error: httpx2.HTTPError) -> str:
    if isinstance(error, httpx2.HTTPStatusError):
        return _message(error.response) if error.response.is_stream_consumed else str(error)
    return str(error) or type(error).__name__
