"""Progress bars on a terminal: one at a time, and the last state is taken away."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from prefloop import machine
from prefloop.machine import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        machine, "Console", lambda stderr: Console(file=screen, force_terminal=True)
    )
    return screen


def test_a_bar_inside_another_shows_nothing(terminal: Terminal) -> None:
    with Bar("outer", 2) as outer, Bar("inner", 5) as inner:
        inner.advance(items=5)
        outer.advance(items=2)
    assert "outer" in terminal.getvalue()
    assert "inner" not in terminal.getvalue()


def test_after_one_bar_has_ended_the_next_is_shown(terminal: Terminal) -> None:
    with Bar("first", 1) as bar:
        bar.advance(items=1)
    with Bar("second", 1) as bar:
        bar.advance(items=1)
    assert "second" in terminal.getvalue()


def test_without_a_terminal_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("quiet", 1) as bar:
        bar.advance(items=1)
    assert capsys.readouterr().err == ""
