"""The command line: its verbs, its one-line errors, and its exit codes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

import prefloop
import prefloop.judges
import prefloop.methods
from prefloop import cli, recipe
from prefloop.config import plugin_names
from prefloop.recipe import load_recipe
from tests.cli.conftest import called

RECIPE = "# A recipe for tests.\nmodel: {dtype: float32}\nmethod: {name: ial}\njudge: {name: similarity}\n"


class Shell:
    """Runs the entry point in this process, in a folder of its own."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
    ) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        monkeypatch.chdir(folder)
        Path("recipes").mkdir()
        Path("recipes/mine.yaml").write_text(RECIPE)

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = called(self.monkeypatch, *words)
        out, err = self.capsys.readouterr()
        return code, out, err


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Shell:
    return Shell(monkeypatch, capsys, tmp_path)


def test_version_is_the_packages(shell: Shell) -> None:
    assert shell("--version") == (0, f"prefloop {prefloop.__version__}\n", "")


def test_every_verb_has_help(shell: Shell) -> None:
    verbs = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert {"check", "ls", "schema"} <= verbs
    for verb in verbs:
        code, out, _ = shell(verb, "--help")
        assert code == 0
        assert f"Usage: prefloop {verb}" in out


def test_check_says_ok(shell: Shell) -> None:
    assert shell("check", "mine") == (0, "mine: ok\n", "")


def test_check_takes_several_overrides(shell: Shell) -> None:
    one_round = ("--set", "loop.rounds=1", "--set", "loop.carry_optimizer=true")
    code, out, _ = shell("check", "mine", "--set", "name=other", *one_round)
    assert code == 0
    assert out == "note: loop.carry_optimizer has no effect in a single round\nother: ok\n"


def test_check_dump_prints_a_recipe_and_nothing_else_on_stdout(shell: Shell) -> None:
    sets = ["loop.rounds=1", "loop.carry_optimizer=true"]
    code, out, err = shell("check", "mine", "--dump", "--set", sets[0], "--set", sets[1])
    assert code == 0
    assert err == "note: loop.carry_optimizer has no effect in a single round\n"
    Path("dumped.yaml").write_text(out)
    assert load_recipe("dumped.yaml") == load_recipe("mine", sets)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("check", "mime"), "prefloop: no recipe 'mime'; did you mean 'mine'?\n"),
        (
            ("check", "mine", "--set", "train.lrr=1"),
            "prefloop: recipes/mine.yaml with --set train.lrr=1: "
            "unknown key 'lrr' in train; did you mean 'lr'?\n",
        ),
        (
            ("check", "mine", "--set", "data.train=mine.jsonl"),
            "prefloop: no file or folder mine.jsonl; a hub data set is written 'owner/name'\n",
        ),
        (
            ("schema", "--out", "nowhere/schema.json"),
            "prefloop: nowhere/schema.json: No such file or directory; correct the path\n",
        ),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(
    shell: Shell, words: tuple[str, ...], sentence: str
) -> None:
    assert shell(*words) == (2, "", sentence)


def test_a_wrong_option_is_exit_code_2(shell: Shell) -> None:
    code, out, err = shell("check", "mine", "--dmp")
    assert (code, out) == (2, "")
    assert "--dump" in err


def test_a_full_disk_is_one_sentence(shell: Shell) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "schema.json")

    shell.monkeypatch.setattr(Path, "write_text", full)
    assert shell("schema", "--out", "schema.json") == (
        2,
        "",
        "prefloop: the disk of schema.json is full; free some space, then the same command goes on where it stopped\n",
    )


def test_an_interrupted_run_says_how_to_go_on(shell: Shell) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    shell.monkeypatch.setattr(recipe, "load_recipe", interrupted)
    code, out, err = shell("check", "mine")
    assert (code, out) == (130, "")
    assert err == "prefloop: interrupted; the same command goes on where it stopped\n"


def test_a_bug_keeps_its_traceback(shell: Shell) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("only a bug does this")

    shell.monkeypatch.setattr(recipe, "load_recipe", broken)
    shell.monkeypatch.setattr("sys.argv", ["prefloop", "check", "mine"])
    with pytest.raises(AssertionError, match="only a bug does this"):
        cli.main()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("methods", plugin_names(prefloop.methods)),
        ("judges", plugin_names(prefloop.judges)),
        ("models", ["embedded:smollm2-135m"]),
    ],
)
def test_ls_lists_all_with_a_line_on_each(shell: Shell, kind: str, expected: list[str]) -> None:
    code, out, _ = shell("ls", kind, "--json")
    listing = json.loads(out)
    assert code == 0
    assert list(listing) == expected
    assert all(listing.values())
    for line, name in zip(shell("ls", kind)[1].splitlines(), expected, strict=True):
        assert line.startswith(name)
        assert line.endswith(listing[name])


def test_ls_recipes_shows_their_first_comment(shell: Shell) -> None:
    assert json.loads(shell("ls", "recipes", "--json")[1])["mine"] == "A recipe for tests."


def test_schema_is_written_where_told(shell: Shell) -> None:
    code, printed, _ = shell("schema")
    assert code == 0
    assert shell("schema", "--out", "schema.json") == (0, "", "")
    assert json.loads(Path("schema.json").read_text()) == json.loads(printed)


def test_ls_shows_reward_recipes_apart_from_a_runs(shell: Shell) -> None:
    _, recipes, _ = shell("ls", "recipes", "--json")
    _, rewards, _ = shell("ls", "reward-recipes", "--json")
    assert "harmless" in json.loads(rewards)
    assert not set(json.loads(rewards)) & set(json.loads(recipes))
