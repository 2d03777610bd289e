"""Many ways in which a server misbehaves: each ends within a second in an answer, a refusal or one sentence."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest

from prefloop.errors import ApiError
from prefloop.generate.api_client import ChatServer, Refused, Reply, ServerOptions
from tests.fake_chat_server import completion
from tests.generate.test_hostile_servers import KEY, answering, asked, head, listening

pytest.importorskip("openai", reason="needs the extra api, which make setup installs")

Speak = Callable[[socket.socket], None]
GOOD = json.dumps(completion("yes"))


def sending(*parts: bytes) -> Speak:
    """Send the parts and close."""

    def speak(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)

    return speak


def without_end(first: bytes, again: bytes) -> Speak:
    def speak(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(again)

    return speak


def silent(connection: socket.socket) -> None:
    time.sleep(0.7)


def reset(before: bytes) -> Speak:
    """The connection is reset, not closed, after the first bytes."""

    def speak(connection: socket.socket) -> None:
        connection.sendall(before)
        time.sleep(0.05)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return speak


def choice(**changes: Any) -> str:
    """An answer whose one choice is another."""
    body = completion("yes")
    body["choices"][0] |= changes
    return json.dumps(body)


def logprobs(content: object) -> Speak:
    return answering(choice(logprobs={"content": content}))


CHUNKED = head(Transfer_Encoding="chunked")
PACKED = b"\x1f\x8b" + b"\0" * 200

NO_CONNECTION: dict[str, Speak] = {
    "no answer at all": silent,
    "closed before a byte": sending(),
    "closed within the headers": sending(b"HTTP/1.1 200 OK\r\nContent-"),
    "closed within the body": sending(head(Content_Length=1000), b'{"choices": ['),
    "reset before a byte": reset(b""),
    "reset within the body": reset(head(Content_Length=1000) + b'{"choices": ['),
    "no HTTP": sending(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a body without headers": sending(GOOD.encode()),
    "a status that is no number": sending(b"HTTP/1.1 OK\r\n\r\n"),
    "two lengths": sending(head(Content_Length="5\r\nContent-Length: 900"), GOOD.encode()),
    "a negative length": sending(head(Content_Length=-5), GOOD.encode()),
    "a chunk without size": sending(CHUNKED, b"zz\r\n{}\r\n"),
    "chunks that stop": sending(CHUNKED, b"5\r\n{\r\n"),
    "interim replies without end": without_end(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "a header without end": without_end(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 65536),
}


@pytest.mark.parametrize("mode", NO_CONNECTION)
def test_a_connection_that_breaks_is_an_api_error_with_a_remedy(mode) -> None:
    begin = time.monotonic()
    with listening(NO_CONNECTION[mode]) as (url, _), pytest.raises(ApiError, match=f"{url} .*;"):
        asked(url, timeout=0.4, max_reply_mb=1)
    assert time.monotonic() - begin < 1


TOO_MUCH: dict[str, Speak] = {
    "a long body": sending(head(Content_Length=2**40), b" " * 2**21),
    "chunks without end": without_end(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "tiny chunks without end": without_end(CHUNKED, b"1\r\n \r\n" * 10_000),
}


@pytest.mark.parametrize("mode", TOO_MUCH)
def test_no_more_is_read_than_allowed(mode) -> None:
    with (
        listening(TOO_MUCH[mode]) as (url, _),
        pytest.raises(ApiError, match=r"more than 0\.25 MiB"),
    ):
        asked(url, timeout=5, max_reply_mb=0.25)


@pytest.mark.parametrize("packing", ["gzip", "br", "deflate", "zstd", "gzip, gzip"])
def test_nothing_is_unpacked(packing) -> None:
    speak = sending(head(Content_Encoding=packing, Content_Length=len(PACKED)), PACKED)
    with listening(speak) as (url, _), pytest.raises(ApiError, match="packs its replies"):
        asked(url)


@pytest.mark.parametrize(
    "place",
    ["http://localhost:9/v1", "https://127.0.0.1/v1", "//localhost/v1", "file:///etc/passwd"],
)
def test_a_redirect_goes_nowhere_else(place) -> None:
    speak = answering("", "308 Permanent Redirect", Location=place)
    with listening(speak) as (url, _), pytest.raises(ApiError, match=f"{url} .*;"):
        asked(url)


@pytest.mark.parametrize("place", ["/v1/chat/completions", "", "http://[::1", "http://\x7f/"])
def test_a_redirect_in_a_circle_or_to_no_address_is_an_api_error(place) -> None:
    speak = answering("", "307 Temporary Redirect", Location=place)
    with listening(speak) as (url, _), pytest.raises(ApiError, match=f"{url} .*;"):
        asked(url)


NO_INTERFACE: dict[str, Speak] = {
    "a page": sending(
        head(Content_Length=13).replace(b"application/json", b"text/html"), b"<html></html>"
    ),
    "a page that is called JSON": answering("<html></html>"),
    "nothing": answering(""),
    "no content": sending(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "half an object": answering(GOOD[:-20]),
    "two objects": answering(GOOD + GOOD),
    "a list": answering("[]"),
    "null": answering("null"),
    "text": answering('"yes"'),
    "no UTF-8": sending(head(Content_Length=12), b'{"a": "\xff\xfe"}'[:12]),
    "an error that is called OK": answering('{"error": {"message": "no"}}'),
    "no choices": answering("{}"),
    "choices that are null": answering('{"choices": null}'),
    "empty choices": answering('{"choices": []}'),
    "choices that are a number": answering('{"choices": 3}'),
    "choices that are text": answering('{"choices": "yes"}'),
    "choices by name": answering('{"choices": {"0": {}}}'),
    "a choice that is null": answering('{"choices": [null]}'),
    "a choice without message": answering('{"choices": [{}]}'),
    "a message that is null": answering(choice(message=None)),
    "a message that is text": answering(choice(message="yes")),
    "a message that is a list": answering(choice(message=["yes"])),
    "content that is a number": answering(choice(message={"content": 4})),
    "content in parts": answering(choice(message={"content": [{"type": "text", "text": "y"}]})),
    "a number with 5,000 digits": answering(
        GOOD.replace('"created": 0', '"created": ' + "9" * 5000)
    ),
}


@pytest.mark.parametrize("mode", NO_INTERFACE)
def test_what_is_not_the_interface_is_an_api_error_with_a_remedy(mode) -> None:
    with listening(NO_INTERFACE[mode]) as (url, _), pytest.raises(ApiError, match=f"{url} .*url"):
        asked(url)


MALFORMED: dict[str, Speak] = {
    "log-probs that are a number": answering(choice(logprobs=3)),
    "log-probs that are a list": answering(choice(logprobs=[1])),
    "tokens that are a number": logprobs(3),
    "a token that is null": logprobs([None]),
    "a token without log-prob": logprobs([{"token": "y"}]),
    "a log-prob that is null": logprobs([{"token": "y", "logprob": None}]),
    "a log-prob that is a list": logprobs([{"token": "y", "logprob": [-1]}]),
    "an infinite log-prob": logprobs([{"token": "y", "logprob": float("inf")}]),
    "likeliest tokens that are a number": logprobs(
        [{"token": "y", "logprob": -1, "top_logprobs": 2}]
    ),
    "a likeliest token that is text": logprobs(
        [{"token": "y", "logprob": -1, "top_logprobs": ["y"]}]
    ),
    "half a character in a thought": answering(
        choice(message={"content": "yes", "reasoning": "\ud800"})
    ),
    "half a character in a reason to finish": answering(choice(finish_reason="\udfff")),
    "lists without end": answering(GOOD.replace('"x"', "[" * 100_000)),
    "objects without end": answering(GOOD.replace('"x"', '{"a":' * 100_000)),
}


@pytest.mark.parametrize("mode", MALFORMED)
def test_an_answer_that_cannot_be_used_is_refused_alone(mode) -> None:
    """Others may well be answered."""
    with listening(MALFORMED[mode]) as (url, _):
        answer = asked(url)
    assert isinstance(answer, Refused)
    assert answer.malformed
    answer.detail.encode()


USABLE: dict[str, Speak] = {
    "HTTP/1.0 without length": sending(b"HTTP/1.0 200 OK\r\n\r\n", GOOD.encode()),
    "a good answer that is called text": sending(
        head(Content_Length=len(GOOD)).replace(b"application/json", b"text/plain"), GOOD.encode()
    ),
    "more choices than asked for": answering(
        json.dumps({"choices": completion("yes")["choices"] * 3})
    ),
    "a field that is not known": answering(GOOD.replace('"created"', '"\\u0000": [], "created"')),
    "a cookie": answering(GOOD, Set_Cookie="a=b"),
    "log-probs that are null": answering(choice(logprobs={"content": None})),
}


@pytest.mark.parametrize("mode", USABLE)
def test_what_is_odd_and_whole_is_an_answer(mode) -> None:
    with listening(USABLE[mode]) as (url, _):
        assert asked(url) == Reply("yes", "stop")


@pytest.mark.parametrize(
    ("pause", "saying"),
    [
        ("86400", "asks to wait 86,400 s"),
        ("1e300", "asks to wait"),
        ("Fri, 31 Dec 9999 23:59:59 GMT", "asks to wait"),
        ("soon", "accepts no more requests after 1 attempt"),
        ("-5", "accepts no more requests after 1 attempt"),
        ("nan", "accepts no more requests after 1 attempt"),
        ("inf", "accepts no more requests after 1 attempt"),
    ],
)
def test_a_pause_of_any_form_is_told_truly(pause, saying) -> None:
    speak = answering("{}", "429 Too Many Requests", Retry_After=pause)
    with listening(speak) as (url, requests):
        with pytest.raises(ApiError, match=saying):
            asked(url)
        assert len(requests) == 1


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Service Unavailable", "599 ?"])
def test_a_storm_of_failures_ends_after_the_retries(status) -> None:
    with listening(answering("{}", status, Retry_After=0)) as (url, requests):
        with pytest.raises(ApiError, match="after 4 attempts"):
            asked(url, retries=3)
        assert len(requests) == 4


def test_a_storm_of_internal_errors_is_the_one_requests_refusal() -> None:
    with listening(answering("oops", "500 Internal Server Error", Retry_After=0)) as (
        url,
        requests,
    ):
        assert isinstance(asked(url, retries=3), Refused)
        assert len(requests) == 4


@pytest.mark.parametrize(
    "status", ["400 Bad", "401 No", "404 Gone", "500 Oops", "503 Busy", "418 ?"]
)
def test_an_error_that_echoes_the_key_is_masked(status, monkeypatch) -> None:
    monkeypatch.setenv("KEY", KEY)
    body = json.dumps({"error": {"message": f"key {KEY}", "type": KEY, "code": KEY, "param": KEY}})
    with listening(answering(body, status, **{f"X-{KEY}": KEY})) as (url, _):
        try:
            said = repr(asked(url, key_env="KEY"))
        except ApiError as error:
            said = str(error)
    assert KEY not in said


@pytest.mark.parametrize(
    "body",
    ["", "[]", "null", "<html>", '{"data": 5}', '{"data": null}', '{"data": [5]}', "{}",
     '{"data": [{"name": "m"}]}', "[" * 100_000],
    ids=range(10),
)  # fmt: skip
def test_a_list_of_models_that_is_none_is_an_api_error_or_names_none(body) -> None:
    with listening(answering(body)) as (url, _):
        server = ChatServer(ServerOptions(url=url, model="m", timeout=0.5, retries=0))
        if body in ("{}", '{"data": null}', '{"data": [{"name": "m"}]}'):
            assert all(isinstance(name, str) for name in server.models())
        else:
            with pytest.raises(ApiError, match=url):
                server.models()
