"""The client against real sockets: what is sent, repeated, paced, and said when it fails."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from prefloop.errors import ApiError
from prefloop.generate.api_client import Ask, ChatServer, Refused, Reply, ServerOptions, Token
from prefloop.records import Message
from tests.fake_chat_server import completion, serve

SECRET = "sk-very-secret-0123456789"


def ask(text: str = "hi", **more: Any) -> Ask:
    return Ask((Message(role="user", content=text),), max_tokens=4, **more)


def options(url: str, **more: Any) -> ServerOptions:
    return ServerOptions(url=url, model="m", **{"retries": 0, **more})


def said(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def test_a_request_carries_what_was_asked_and_the_reply_comes_back() -> None:
    with serve(lambda body: f"you said {said(body)}") as server:
        reply = ChatServer(options(server.url)).complete(
            ask("hello", temperature=0.5, seed=7, top_logprobs=3, extra={"top_k": 20})
        )
        assert reply == Reply("you said hello", "stop")
        (body,) = server.asked
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "temperature": 0.5,
        "top_p": 1.0,
        "seed": 7,
        "logprobs": True,
        "top_logprobs": 3,
        "top_k": 20,
    }


def test_log_probs_are_read_where_they_are_offered() -> None:
    entry = {
        "token": "4",
        "logprob": -0.1,
        "top_logprobs": [{"token": "4", "logprob": -0.1}, {"token": "5", "logprob": -2.5}],
    }
    with serve(lambda _: (200, completion("4", {"content": [entry]}))) as server:
        reply = ChatServer(options(server.url)).complete(ask(top_logprobs=2))
    assert isinstance(reply, Reply)
    assert reply.tokens == (Token("4", -0.1, (("4", -0.1), ("5", -2.5))),)


def test_answers_come_with_their_places_and_several_are_under_way_at_once() -> None:
    together = threading.Barrier(4)

    def answer(body: dict[str, Any]) -> str:
        together.wait(timeout=10)  # breaks unless four requests are under way
        return said(body).upper()

    with serve(answer) as server:
        client = ChatServer(options(server.url, concurrency=4))
        found = dict(client.each([ask(f"q{n}") for n in range(8)]))
        assert server.most_at_once == 4
    assert found == {n: Reply(f"Q{n}", "stop") for n in range(8)}


def test_an_overloaded_server_is_asked_again_until_it_answers() -> None:
    states = iter([429, 503, 429])

    def answer(_: dict[str, Any]) -> tuple[int, object] | str:
        status = next(states, None)
        return "done" if status is None else (status, {"error": {"message": "busy"}})

    with serve(answer) as server:
        reply = ChatServer(options(server.url, retries=3)).complete(ask())
        assert reply == Reply("done", "stop")
        assert len(server.asked) == 4


def test_a_server_that_comes_back_is_found_again() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found: list[object] = []
    client = ChatServer(options(f"http://127.0.0.1:{port}/v1", retries=6))
    waiting = threading.Thread(target=lambda: found.append(client.complete(ask())))
    waiting.start()
    time.sleep(0.3)
    with serve(lambda _: "back", port=port):
        waiting.join()
    assert found == [Reply("back", "stop")]


def test_requests_begin_no_faster_than_the_pace() -> None:
    with serve(lambda _: "x") as server:
        client = ChatServer(options(server.url, requests_per_minute=60 / 0.05))
        begun = time.monotonic()
        assert len(list(client.each([ask(str(n)) for n in range(6)]))) == 6
        assert time.monotonic() - begun >= 5 * 0.05


def test_one_refused_request_leaves_the_others_alone() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, object] | str:
        if "long" in said(body):
            return 400, {"error": {"message": "maximum context length is 8"}}
        return "fine"

    with serve(answer) as server:
        found = dict(ChatServer(options(server.url)).each([ask("a"), ask("too long"), ask("b")]))
    assert found[0] == found[2] == Reply("fine", "stop")
    assert found[1] == Refused("status 400: maximum context length is 8")


def test_after_a_failure_nothing_new_is_asked_and_what_was_under_way_is_kept() -> None:
    second_is_there = threading.Event()

    def answer(body: dict[str, Any]) -> tuple[int, object] | str:
        if said(body) == "q1":
            second_is_there.set()
            time.sleep(0.2)
            return "kept"
        second_is_there.wait(timeout=10)
        return 404, {"error": {"message": "no such model"}}

    with serve(answer) as server:
        client = ChatServer(options(server.url, concurrency=2))
        found: list[tuple[int, object]] = []
        with pytest.raises(ApiError, match="no such model"):
            found.extend(client.each([ask(f"q{n}") for n in range(50)]))
        assert len(server.asked) < 10
    # extend() had taken in what came before the error.
    assert found == [(1, Reply("kept", "stop"))]


def _failing(status: int, body: object) -> Callable[[dict[str, Any]], tuple[int, object]]:
    return lambda _: (status, body)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"error": {"message": f"bad key {SECRET}"}}, r"refuses the key in PREFLOOP_KEY"),
        (403, {"error": {"message": "no"}}, r"status 403\); name the right key_env"),
        (
            404,
            {"error": {"message": "unknown model"}},
            r"no model 'm'.*unknown model.*correct model",
        ),
        (429, {"error": {"message": f"{SECRET} is slow"}}, r"after 1 attempt.*lower concurrency"),
        (503, {"error": {"message": "loading"}}, r"status 503 after 1 attempt \(loading\)"),
        (200, "<html>hello</html>", r"does not answer as OpenAI's interface does"),
        (200, {"answer": "hi"}, r"does not answer as OpenAI's interface does"),
        (200, {"choices": []}, r"does not answer as OpenAI's interface does"),
        (200, completion({"not": "text"}), r"message.content is of type dict"),
    ],
)
def test_a_failure_is_one_sentence_without_the_key(
    status: int, body: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFLOOP_KEY", SECRET)
    with serve(_failing(status, body)) as server:
        client = ChatServer(options(server.url, key_env="PREFLOOP_KEY"))
        with pytest.raises(ApiError, match=words) as caught:
            client.complete(ask())
        assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    assert server.url in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: refuses at once
        client = ChatServer(options(f"http://127.0.0.1:{unused.getsockname()[1]}/v1"))
        with pytest.raises(ApiError, match="cannot be reached after 1 attempt; start the server"):
            client.complete(ask())
        with pytest.raises(ApiError, match="cannot be reached"):
            client.models()


def test_a_slow_server_is_one_sentence() -> None:
    def answer(_: dict[str, Any]) -> str:
        time.sleep(0.5)
        return "late"

    with (
        serve(answer) as server,
        pytest.raises(ApiError, match=r"within 0\.1 s after 1 attempt; raise timeout"),
    ):
        ChatServer(options(server.url, timeout=0.1)).complete(ask())


def test_the_models_of_a_server_are_listed() -> None:
    with serve(lambda _: "x") as server:
        assert ChatServer(options(server.url)).models() == ["m"]


def test_without_a_named_variable_no_key_of_the_environment_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serve(lambda _: "x") as server:
        ChatServer(options(server.url)).complete(ask())
        assert SECRET not in json.dumps(server.headers)


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFLOOP_KEY", raising=False)
    with pytest.raises(ApiError, match="PREFLOOP_KEY, which is not set; export it"):
        ChatServer(options("http://127.0.0.1:1/v1", key_env="PREFLOOP_KEY"))


def test_an_address_without_a_scheme_is_refused() -> None:
    with pytest.raises(ValidationError, match="url"):
        options("localhost:8000")
