"""The server: what it refuses, what it never says, and the command around it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from prefloop import cli
from prefloop.annotate.server import AnnotationServer, Handler, is_loopback
from prefloop.annotate.service import AnnotationService
from prefloop.errors import DataError, PrefloopError
from tests.annotate.conftest import Command


def ask(
    server: AnnotationServer, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body; a header named None is left out."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    given = {"Content-Type": "application/json", "X-Prefloop-Token": server.token}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    sent = None if body is None else body if isinstance(body, str) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, sent, given)
    response = connection.getresponse()
    found = response.status, dict(response.headers), response.read().decode()
    connection.close()
    return found


def post(server: AnnotationServer, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    status, _, text = ask(server, f"/api/{path}", body, **headers)
    return status, json.loads(text)


ANN = {"name": "Ann"}


def test_the_page_may_load_nothing_from_elsewhere_and_run_no_other_script(
    server: AnnotationServer,
) -> None:
    for path in ("/", "/annotate.js", "/annotate.css"):
        status, headers, text = ask(server, path)
        assert status == 200
        assert text
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "http:" not in text.replace("http-equiv", "")
        assert "innerHTML" not in text
        assert server.token not in text


@pytest.mark.parametrize("path", ["/../items.py", "/page/index.html", "/api/join", "/x"])
def test_nothing_else_can_be_got(server: AnnotationServer, path: str) -> None:
    assert ask(server, path)[0] == 404


def test_a_foreign_host_name_is_refused(server: AnnotationServer) -> None:
    for host in (
        "evil.example",
        f"evil.example:{server.server_port}",
        "127.0.0.1.evil.example",
        "",
    ):
        assert ask(server, "/", Host=host)[0] == 421
        assert post(server, "join", ANN, Host=host)[0] == 421
    for host in ("localhost:1234", "127.0.0.1", "[::1]:8765"):  # as an SSH tunnel sends it
        assert ask(server, "/", Host=host)[0] == 200


def test_without_the_links_secret_nobody_votes_or_reads(server: AnnotationServer) -> None:
    for token in ("", "x", server.token[:-1], "\u00e9"):
        status, found = post(server, "join", ANN, X_Prefloop_Token=token)
        assert status == 403
        assert "open the one that prefloop annotate printed last" in found["error"]


def test_another_sites_page_is_refused_even_with_the_secret(server: AnnotationServer) -> None:
    strange = f"http://localhost.evil:{server.server_port}"
    for origin in ("http://evil.example", "null", strange, "http://[", ""):
        assert post(server, "join", ANN, Origin=origin)[0] == 403
    own = f"http://127.0.0.1:{server.server_port}"
    assert post(server, "join", ANN, Origin=own)[0] == 200
    assert ask(server, "/api/join", ANN, Content_Type="text/plain")[0] == 415


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("join", {"name": "  "}, 400),
        ("join", {"name": "x" * 41}, 400),
        ("join", {"name": "a\u202eb"}, 400),
        ("join", {}, 400),
        ("join", "[", 400),
        ("join", "x" * 70000, 413),
        ("vote", {"name": "Nobody", "item": "a-1", "answer": "tie"}, 400),
        ("vote", {"name": "Ann", "item": "a-99", "answer": "tie"}, 400),
        ("vote", {"name": "Ann", "item": "a-1", "answer": "a"}, 400),
        ("vote", {"name": "Ann", "item": "a-1", "answer": "skip", "reason": " "}, 400),
        ("vote", {"name": "Ann", "item": "a-1", "answer": "tie", "seconds": -1}, 400),
        ("other", {}, 404),
    ],
)
def test_what_the_page_would_never_send_is_refused_in_a_sentence(
    server: AnnotationServer, path: str, body: Any, status: int
) -> None:
    assert post(server, "join", ANN)[0] == 200
    found = post(server, path, body)
    assert found[0] == status
    assert found[1]["error"]
    assert len(Path("votes.jsonl").read_text().splitlines()) == 2


def test_no_answer_of_the_server_tells_whose_answer_is_whose(server: AnnotationServer) -> None:
    _, state = post(server, "join", ANN)
    assert sorted(state) == ["done", "instructions", "item", "name", "total", "undo"]
    assert sorted(state["item"]) == ["first", "id", "messages", "second"]
    assert "b.jsonl" not in json.dumps(state)


def test_votes_by_place_are_written_by_side(service: AnnotationService) -> None:
    state = service.join("Ann")
    sides = {}
    while (item := state["item"]) is not None:
        sides[item["id"]] = item["first"][0]
        state = service.vote("Ann", item["id"], "first", None, 0.5)
    assert (state["done"], state["item"]) == (6, None)
    written = [json.loads(line) for line in Path("votes.jsonl").read_text().splitlines()[2:]]
    assert {line["item"]: line["choice"] for line in written} == sides
    assert {line["item"]: line["first"] for line in written} == sides
    assert set(sides.values()) == {"a", "b"}


def test_one_name_is_one_person_however_it_is_written(service: AnnotationService) -> None:
    state = service.join("Ann  Smith")
    service.vote("Ann Smith", state["item"]["id"], "tie", None, None)
    again = service.join(" ann smith ")
    assert (again["name"], again["done"]) == ("Ann Smith", 1)
    assert service.join("Bob")["done"] == 0
    with pytest.raises(DataError):
        service.join("\n")


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
    ],
)
def test_what_is_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) == local


def test_a_taken_port_is_said(server: AnnotationServer, service: AnnotationService) -> None:
    with pytest.raises(PrefloopError, match="name another --port, or 0"):
        AnnotationServer(service, port=server.server_port)


def test_other_addresses_let_addresses_in_but_no_foreign_names(service: AnnotationService) -> None:
    with AnnotationServer(service, "0.0.0.0") as server:
        assert server.is_own_host("192.168.1.5:8765")
        assert not server.is_own_host("evil.example")
        assert "0.0.0.0" not in server.link


def test_the_name_that_was_given_as_host_is_the_servers_own(service: AnnotationService) -> None:
    with AnnotationServer(service, "0.0.0.0") as server:
        server.host = "Lab.example.org"  # a name of this machine, other than it calls itself
        assert server.is_own_host(f"lab.example.org:{server.server_port}")
        assert not server.is_own_host("example.org")


def test_a_bug_is_shown_and_a_browser_that_hung_up_is_not(
    server: AnnotationServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for error, shown in ((KeyError("a bug"), True), (ConnectionResetError("gone"), False)):

        def raises(handler: Handler, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Handler, "do_GET", raises)
        with pytest.raises((HTTPException, OSError)):
            ask(server, "/")
        assert bool(capfd.readouterr().err) is shown


def test_the_command_ends_with_the_report_and_goes_on_after_a_kill(
    command: Callable[..., Command],
) -> None:
    begun = command()
    assert "6 items, votes in annotations/a-vs-b.jsonl" in begun.first[0]
    begun.process.kill()
    begun.process.wait()
    path = Path("annotations/a-vs-b.jsonl")
    path.write_text(path.read_text() + '{"kind": "vo')
    again = command("--host", "localhost")
    assert "note: the last line of annotations/a-vs-b.jsonl was torn (12 bytes)" in again.first[0]
    code, out = again.end(signal.SIGINT)
    assert code == 0
    assert "A's win rate: no votes yet" in out


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["prefloop", "annotate", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_report_can_be_had_without_a_server(
    service: AnnotationService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = service.join("Ann")
    service.vote("Ann", state["item"]["id"], "tie", None, 2.0)
    words = ("a.jsonl", "b.jsonl", "--votes", "votes.jsonl", "--report")
    assert run(monkeypatch, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["annotators"]["Ann"]["tie"] == 1
    assert run(monkeypatch, *words) == 0
    assert "1 of 6 prompts judged" in capsys.readouterr().out
    assert run(monkeypatch, "a.jsonl", "b.jsonl", "--report") == 2
    assert "there are no votes in annotations/a-vs-b.jsonl" in capsys.readouterr().err


def test_wrong_options_are_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("latin.txt").write_bytes(b"\xe4")
    for words, says in [
        (("--shared", "2"), "--shared 2 needs --each"),
        (("--instructions", "latin.txt"), "latin.txt is not UTF-8"),
        (("--instructions", "none.txt"), "none.txt: No such file"),
        (("--host", "256.1.1.1"), "cannot listen on 256.1.1.1"),
    ]:
        assert run(monkeypatch, "a.jsonl", "b.jsonl", *words) == 2
        assert says in capsys.readouterr().err
