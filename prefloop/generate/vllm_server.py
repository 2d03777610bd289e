"""A vLLM server: started under a supervisor and reached over a socket in a private folder, or given by URL."""

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

_RESUME = "the same command goes on where the run stopped"
_POLL_SECONDS = 0.25
_ERROR_LINE = re.compile(r"\b[A-Za-z.]*(?:Error|Exception|error)\b.*?: .+")


class Refusal(Exception):
    """The server's message on a request that it refuses."""


class Server:
    """A server, started here or given by URL; requests raise GenerationError where it is gone."""

    def __init__(self, url: str | None, log: Path, *, concurrency: int, timeout: float) -> None:
        """Does not connect yet. `timeout` bounds one answer, in seconds."""
        self._url = url
        self._log = log
        self._concurrency = concurrency
        self._timeout = httpx2.Timeout(timeout, connect=30.0, pool=None)
        self._supervisor: subprocess.Popen[str] | None = None
        self._group = 0
        self._log_start = 0
        """Size of the log in bytes when this server was started."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    # Start and end.

    def start(self, command: Sequence[str], timeout: float) -> None:
        """Start a server and wait until it is ready; the socket's path is added to the command."""
        self.stop()
        # A socket's path is limited to 107 bytes, which a run's folder can exceed.
        self._folder = tempfile.TemporaryDirectory(prefix="prefloop-")
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._supervisor = subprocess.Popen(
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
        assert self._supervisor.stdout is not None
        self._group = int(self._supervisor.stdout.readline() or 0)
        deadline = time.monotonic() + timeout
        with Bar("starting vLLM", 0):
            while not self._is_ready():
                if self._supervisor.poll() is not None:
                    raise GenerationError(
                        f"vLLM could not be started: {self._last_words()}; all it said is in {self._log}"
                    )
                if time.monotonic() > deadline:
                    self.stop()
                    raise GenerationError(
                        f"vLLM was not ready within {timeout:g} s; see {self._log}, "
                        "or raise engine.start_timeout"
                    )
                time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """End the server that was started here, if any, with all its child processes."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None or self._folder is None:
            return
        self._folder.cleanup()
        assert supervisor.stdin is not None
        supervisor.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            supervisor.wait(GRACE + 5)
        # Usually nothing is left to kill, unless the supervisor itself was killed.
        supervisor.kill()
        supervisor.wait()
        if self._group:
            kill(self._group)
        assert supervisor.stdout is not None
        supervisor.stdout.close()

    # Requests.

    def ask(self, path: str, body: Body) -> Any:
        """Post one request and return its answer. Raises Refusal."""
        (answer,) = self.ask_all(path, [body], lambda answer: None)
        return answer

    def ask_all(self, path: str, bodies: Sequence[Body], each: Callable[[Any], None]) -> list[Any]:
        """Post requests concurrently; `each` gets the answers as they come, the result has them in order."""
        answers: list[Any] = [None] * len(bodies)
        failures: list[Refusal | httpx2.HTTPError] = []

        async def work() -> None:
            limit = anyio.CapacityLimiter(self._concurrency)
            async with self._client() as client, anyio.create_task_group() as group:

                async def ask_one(index: int) -> None:
                    async with limit:
                        if failures:
                            return
                        try:
                            answer = _answer(await client.post(path, json=bodies[index]))
                        except (Refusal, httpx2.HTTPError) as error:
                            failures.append(error)
                            return
                    answers[index] = answer
                    each(answer)

                for index in range(len(bodies)):
                    group.start_soon(ask_one, index)

        _run(work)
        for failure in failures:
            raise self._failure(failure) if isinstance(failure, httpx2.HTTPError) else failure
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

    def _is_ready(self) -> bool:
        async def work() -> bool:
            async with self._client() as client:
                return (await client.get("/health", timeout=5.0)).is_success

        with contextlib.suppress(httpx2.HTTPError):
            return _run(work)
        return False

    # Error messages.

    def _failure(self, error: httpx2.HTTPError) -> GenerationError:
        if isinstance(error, httpx2.ReadTimeout):
            return GenerationError(
                f"vLLM gave no answer within {self._timeout.read:g} s; see its log, lower "
                f"engine.max_num_seqs or raise engine.answer_timeout; {_RESUME}"
            )
        if self._url is not None:
            return GenerationError(
                f"the vLLM server at {self._url} is gone or failing ({_describe(error)}); start it again, "
                f"then {_RESUME}"
            )
        # A server whose engine was killed exits a little later than its connections break.
        with contextlib.suppress(subprocess.TimeoutExpired):
            exit_code = self._supervisor.wait(GRACE) if self._supervisor else 0
            cause = (
                f"was killed by {signal.Signals(exit_code - 128).name}"
                if exit_code > 128
                else "died"
            )
            return GenerationError(
                f"vLLM {cause} (its last words: {self._last_words()}; all of them are in {self._log}); "
                f"{_RESUME}"
            )
        return GenerationError(f"vLLM fails ({_describe(error)}); see {self._log}; {_RESUME}")

    def _last_words(self) -> str:
        """The last line of the log that names an error, else the last line."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").split("\n")
        errors = [match.group() for line in lines if (match := _ERROR_LINE.search(line))]
        nonempty = [line for line in lines if line.strip()]
        return (errors or nonempty or ["nothing"])[-1].strip()[:300].rstrip(".")


def _run(work: Callable[[], Awaitable[T]]) -> T:
    """Run in another thread: a notebook has its own event loop, and Ctrl-C must work."""
    with start_blocking_portal() as portal:
        return portal.call(work)


def _answer(response: httpx2.Response) -> Any:
    """The body of a response. Raises Refusal where retrying is useless, HTTPError for other failures."""
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
        message = body.get("error", {}).get("message") or body.get("message") or body.get("detail")
    except (ValueError, AttributeError):
        message = None
    return " ".join(str(message or f"status {response.status_code}").split())[:300].rstrip(".")


def _describe(error: httpx2.HTTPError) -> str:
    if isinstance(error, httpx2.HTTPStatusError):
        return _message(error.response) if error.response.is_stream_consumed else str(error)
    return str(error) or type(error).__name__
