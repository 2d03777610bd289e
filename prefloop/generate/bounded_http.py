"""Connections to one server that may be slow or hostile: an attempt ends in time, a reply has a size, and no
redirect leads elsewhere.

The client's own timeouts hold for each read, so a server that sends a byte now and then is never too slow.
Here the deadline is the attempt's. Imported only where a server is opened: `httpx2` comes with `openai`.
"""

from __future__ import annotations

import threading
import time
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2


class Refusal(Exception):
    """A reply that is not read any further; asking again would give the same."""


def client(timeout: float, largest: int, url: str) -> httpx2.Client:
    """A client for the server at `url`. `timeout`: seconds an attempt. `largest`: bytes of a reply."""
    return httpx2.Client(
        transport=_Transport(timeout, largest, httpx2.URL(url)),
        timeout=timeout,
        follow_redirects=True,
        # What is packed may unpack to any size.
        headers={"Accept-Encoding": "identity"},
        # Proxies are the transport's; a .netrc must not add a key of its own.
        trust_env=False,
    )


def refusal(error: BaseException | None) -> str | None:
    """Why a reply was not read, if that is the cause of `error`."""
    while error is not None:
        if isinstance(error, Refusal):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


class _Attempt(threading.local):
    """What the attempt in this thread may still take."""

    until = float("inf")
    left = 0

    def seconds(self, wanted: float | None) -> float:
        left = self.until - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the attempt's time is up")
        return left if wanted is None else min(left, wanted)


class _Transport(httpx2.HTTPTransport):
    def __init__(self, timeout: float, largest: int, url: httpx2.URL) -> None:
        proxy = None if proxy_bypass(url.host) else getproxies().get(url.scheme)
        super().__init__(limits=httpx2.Limits(max_connections=None), proxy=proxy)
        self._timeout = timeout
        self._largest = largest
        self._url = url
        self._attempt = _Attempt()
        # httpx2 hands no network backend on; this is where httpcore2 keeps the one it was given.
        self._pool._network_backend = _Backend(self._attempt, largest)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if (request.url.scheme, request.url.host) != (self._url.scheme, self._url.host):
            raise Refusal(
                f"sends requests on to {request.url.scheme}://{request.url.host}, where they are not to go; "
                "correct url"
            )
        self._attempt.until = time.monotonic() + self._timeout
        self._attempt.left = self._largest
        response = super().handle_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Refusal("packs its replies although it is asked not to; switch that off")
        return response


class _Backend(httpcore2.SyncBackend):
    def __init__(self, attempt: _Attempt, largest: int) -> None:
        self._attempt = attempt
        self._largest = largest

    def connect_tcp(  # type: ignore[override]
        self, host: str, port: int, timeout: float | None = None, **rest: Any
    ) -> httpcore2.NetworkStream:
        stream = super().connect_tcp(host, port, self._attempt.seconds(timeout), **rest)
        return _Stream(stream, self._attempt, self._largest)


class _Stream(httpcore2.NetworkStream):
    """A connection that counts seconds and bytes."""

    def __init__(self, stream: httpcore2.NetworkStream, attempt: _Attempt, largest: int) -> None:
        self._stream = stream
        self._attempt = attempt
        self._largest = largest

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._stream.read(max_bytes, self._attempt.seconds(timeout))
        self._attempt.left -= len(data)
        if self._attempt.left < 0:
            raise Refusal(
                f"sends more than {self._largest / 2**20:g} MiB in one reply; raise max_reply_mb if that is meant"
            )
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._attempt.seconds(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *words: Any, **options: Any) -> httpcore2.NetworkStream:
        return _Stream(self._stream.start_tls(*words, **options), self._attempt, self._largest)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
