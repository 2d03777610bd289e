"""What holds for every command: -h, summaries, --quiet, --verbose, NO_COLOR, completion and exit codes."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.console import Console

from prefloop import cli, recipe
from prefloop.machine import Bar
from prefloop.records import Message, Pair
from prefloop.report.console import show_pair
from tests.cli.test_cli import Shell

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Shell:
    return Shell(monkeypatch, capsys, tmp_path)


def verbs() -> Iterator[tuple[list[str], Any]]:
    """Every command with the words that call it."""
    todo: list[tuple[list[str], Any]] = [([], typer.main.get_command(cli.app))]
    while todo:
        words, command = todo.pop()
        yield words, command
        todo += [
            ([*words, name], inner) for name, inner in getattr(command, "commands", {}).items()
        ]


@pytest.mark.parametrize("words", [words for words, _ in verbs()], ids=" ".join)
def test_h_is_help_everywhere(shell: Shell, words: list[str]) -> None:
    code, out, _ = shell(*words, "-h")
    assert (code, out) == (0, shell(*words, "--help")[1])
    assert "--quiet" in out
    assert "--verbose" in out


def test_no_summary_is_cut(shell: Shell) -> None:
    listing = " ".join(shell("--help")[1].split())
    assert "..." not in listing.partition("Commands:")[2]
    for words, command in verbs():
        if len(words) == 1:
            assert " ".join(command.help.split("\n\n")[0].split()) in listing


@pytest.mark.parametrize("words", [("-q", "check", "mine"), ("check", "mine", "--quiet")])
def test_quiet_leaves_notes_out_and_results_in(shell: Shell, words: tuple[str, ...]) -> None:
    assert shell(*words, "--set", "loop.rounds=1") == (0, "mine: ok\n", "")
    assert Bar.hidden


def test_quiet_keeps_errors(shell: Shell) -> None:
    code, out, err = shell("-q", "check", "mime")
    assert (code, out, err) == (2, "", "prefloop: no recipe 'mime'; did you mean 'mine'?\n")


def test_how_much_is_told_holds_for_one_call(shell: Shell) -> None:
    shell("-q", "check", "mine")
    assert "note: " in shell("check", "mine", "--set", "evaluate.early_stopping_threshold=0.1")[1]
    assert not Bar.hidden


def test_verbose_says_where_an_error_arose_before_its_sentence(shell: Shell) -> None:
    code, _, err = shell("check", "mime", "-v")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1] == "prefloop: no recipe 'mime'; did you mean 'mine'?"


def test_quiet_and_verbose_together_are_refused(shell: Shell) -> None:
    code, _, err = shell("-q", "check", "mine", "-v")
    assert code == 2
    assert "--quiet and --verbose exclude each other" in " ".join(err.split())


def test_without_colours_the_differences_are_still_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal whose user wants no colours."""
    monkeypatch.setenv("NO_COLOR", "1")
    pair = Pair(
        prompt_id="p",
        round=0,
        prompt=(Message(role="user", content="?"),),
        chosen="a b",
        rejected="a c",
    )
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False)
    show_pair(pair, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a {+b+}" in text
    assert "a [-c-]" in text
    assert "\x1b[3" not in text


def completed(words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> list[str]:
    monkeypatch.setenv("_PREFLOOP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    monkeypatch.setattr("sys.argv", ["prefloop"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    return str(capsys.readouterr().out).split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("prefloop ver", "verify"),
        ("prefloop run quickstart-i", "quickstart-ial"),
        ("prefloop ls reward", "reward-recipes"),
        ("prefloop new --method se", "self_rewarding"),
        ("prefloop run --acc", "--accept-changes"),
    ],
)
def test_the_shell_completes(
    words: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed(words, monkeypatch, capsys) == [expected]


# Exit codes.


def table() -> dict[int, str]:
    page = (ROOT / "docs/command-line.md").read_text("utf-8")
    rows = page.partition("## Exit codes")[2]
    return {int(code): meaning for code, meaning in re.findall(r"\| (\d+) \| (.+) \|", rows)}


def test_the_table_of_exit_codes_is_the_programs() -> None:
    assert table() == cli.EXIT_CODES


def raising(shell: Shell, error: BaseException) -> int:
    def broken(*_: object) -> None:
        raise error

    shell.monkeypatch.setattr(recipe, "load_recipe", broken)
    return shell("check", "mine")[0]


def test_each_exit_code_of_the_table_comes_about(shell: Shell, tmp_path: Path) -> None:
    damaged = tmp_path / "run/rounds/0000"
    damaged.mkdir(parents=True)
    (tmp_path / "run/recipe.yaml").write_text("name: run\n")
    (damaged / "pairs.done.json").write_text("{}")
    codes = {
        shell("--version")[0],
        shell("verify", "run")[0],
        shell("check", "mime")[0],
        shell("check", "--nonsense")[0],
        raising(shell, KeyboardInterrupt()),
        raising(shell, SystemExit(128 + signal.SIGTERM)),
    }
    assert codes == set(table())


def test_a_bug_is_exit_code_1_with_its_traceback(tmp_path: Path) -> None:
    script = "import prefloop.cli as c, sys; c._check_words = 0; sys.argv = ['prefloop']; c.main()"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
