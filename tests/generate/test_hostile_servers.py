"""Servers that are slow, boundless or hostile: an attempt ends in time, and no reply breaks the judge."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from prefloop.errors import ApiError
from prefloop.generate.api_client import Ask, ChatServer, Refused, Reply, ServerOptions
from prefloop.judges.api import MALFORMED, Api, StoredReply, VerdictFile
from prefloop.records import Message, Prompt
from tests.fake_chat_server import completion

pytest.importorskip("openai", reason="needs the extra api, which make setup installs")

KEY = "sk-very-secret-0123456789"
ASK = Ask((Message(role="user", content="hi"),), max_tokens=4)


@contextmanager
def listening(speak: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[int]]]:
    """A server that reads a request and then does what `speak` does; its URL, and the requests so far."""
    asked: list[int] = []
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    done = threading.Event()

    def one(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            # All of it: a connection that is closed with bytes unread is reset, and takes its reply along.
            asked.append(len(whole_request(connection)))
            speak(connection)

    def work() -> None:
        while not done.is_set():
            with suppress(TimeoutError):
                threading.Thread(target=one, args=(server.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1", asked
    finally:
        done.set()
        thread.join()
        server.close()


def whole_request(connection: socket.socket) -> bytes:
    def more() -> bytes:
        if data := connection.recv(65536):
            return data
        raise ConnectionError("the client is gone")

    data = b""
    while b"\r\n\r\n" not in data:
        data += more()
    headers, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", headers, re.IGNORECASE)
    while length and len(body) < int(length[1]):
        body += more()
    return headers + body


def head(status: str = "200 OK", **headers: object) -> bytes:
    lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    common = "Content-Type: application/json\r\nConnection: close"
    return f"HTTP/1.1 {status}\r\n{common}\r\n{lines}\r\n".encode()


def answering(body: str, status: str = "200 OK", **headers: object) -> Callable[[Any], None]:
    data = body.encode()
    whole = head(status, Content_Length=len(data), **headers) + data
    return lambda connection: connection.sendall(whole)


def asked(url: str, **more: Any) -> Reply | Refused:
    options = {"timeout": 0.5, "retries": 0, **more}
    return ChatServer(ServerOptions(url=url, model="m", **options)).complete(ASK)


def drip(before: bytes) -> Callable[[socket.socket], None]:
    def speak(connection: socket.socket) -> None:
        connection.sendall(before)
        for _ in range(100):
            connection.sendall(b" ")
            time.sleep(0.1)

    return speak


@pytest.mark.parametrize(
    "speak", [drip(head(Content_Length=1000)), drip(b"HTTP/1.1 200 OK\r\nX-Slow: ")]
)
def test_the_timeout_bounds_the_whole_attempt_however_the_bytes_drip(speak) -> None:
    """One byte each 0.4 s went on past 45 s at `timeout: 3`."""
    begin = time.monotonic()
    with (
        listening(speak) as (url, _),
        pytest.raises(ApiError, match=r"within 0\.5 s after 1 attempt;"),
    ):
        asked(url)
    assert time.monotonic() - begin < 1.5


def test_a_reply_without_end_is_read_no_further_than_allowed() -> None:
    def speak(connection: socket.socket) -> None:
        connection.sendall(head())
        while True:
            connection.sendall(b" " * 65536)

    with listening(speak) as (url, _), pytest.raises(ApiError, match="more than 1 MiB"):
        asked(url, timeout=30, max_reply_mb=1)


def test_a_packed_reply_is_not_unpacked() -> None:
    speak = answering("{}", Content_Encoding="gzip")
    with listening(speak) as (url, _), pytest.raises(ApiError, match="packs its replies"):
        asked(url)


@pytest.mark.parametrize("code", ["307 Temporary Redirect", "302 Found"])
def test_prompts_are_not_redirected_to_another_host(code) -> None:
    speak = answering("", code, Location="http://localhost:9/v1/chat/completions")
    with listening(speak) as (url, _), pytest.raises(ApiError, match="sends requests on to"):
        asked(url)


def test_a_long_wait_is_told_truly_and_asked_for_once() -> None:
    speak = answering("{}", "429 Too Many Requests", Retry_After=3600)
    with listening(speak) as (url, requests):
        with pytest.raises(ApiError, match=r"wait 3,600 s \(status 429, after 1 attempt\)"):
            asked(url, retries=8)
        assert len(requests) == 1


def test_a_wait_within_the_limit_is_waited_for() -> None:
    def speak(connection: socket.socket) -> None:
        first = answering("{}", "429 Too Many Requests", Retry_After=1)
        then = answering(json.dumps(completion("yes")))
        (first if len(requests) == 1 else then)(connection)

    begin = time.monotonic()
    with listening(speak) as (url, requests):
        assert asked(url, retries=1) == Reply("yes", "stop")
    assert 1 <= time.monotonic() - begin < 3


def test_a_key_that_the_server_echoes_is_masked(monkeypatch) -> None:
    monkeypatch.setenv("KEY", KEY)
    echo = answering(json.dumps(completion(f"your key is {KEY}")))
    with listening(echo) as (url, _):
        assert asked(url, key_env="KEY") == Reply("your key is [key]", "stop")


def with_logprobs(value: object) -> str:
    return json.dumps(completion("5", {"content": [{"token": "5", "logprob": value}]}))


BROKEN = {
    "a log-prob of 5000": with_logprobs(5000),
    "a log-prob that is text": with_logprobs("x"),
    "log-probs that are text": json.dumps(completion("5", "x")),
    "a log-prob that is NaN": with_logprobs(float("nan")),
    "half a character": json.dumps(completion("\ud800 5")),
    "JSON nested without end": json.dumps(completion("5")).replace('"x"', "[" * 100_000),
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_a_verdict_that_breaks_is_no_verdict_with_its_reason(body, tmp_path) -> None:
    with listening(answering(body)) as (url, _):
        judge = Api(url=url, model="m", mode="pointwise", retries=0, verdicts=str(tmp_path / "v"))
        from prefloop.generate.templates import PromptSet

        prompt = Prompt(id="p", messages=(Message(role="user", content="?"),))
        (verdict,) = judge.open(None, PromptSet("compact")).score([prompt], [("an answer",)])
    assert verdict.reason == MALFORMED


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://:80/v1", "http://h:99999/v1", "http://h:x/v1"]
)
def test_an_address_that_is_none_is_refused(url) -> None:
    with pytest.raises(ValueError, match="is no address"):
        ServerOptions(url=url, model="m")


def test_an_edited_verdict_is_noticed(tmp_path) -> None:
    path = tmp_path / "verdicts.jsonl"
    VerdictFile(path).add(StoredReply(key="k", reply="4", row=(0.25, 0.75)))
    assert VerdictFile(path).replies["k"].row == (0.25, 0.75)
    path.write_text(path.read_text().replace("0.25", "0.15"))
    from prefloop.errors import JudgeError

    with pytest.raises(JudgeError, match="is not as it was written"):
        VerdictFile(path)
