"""`prefloop new`: what it writes can be run as it is, and nothing is written that could not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import prefloop.methods
from prefloop import cli
from prefloop.config import plugin_names
from prefloop.recipe import load_recipe
from tests.cli.test_cli import Shell


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Shell:
    return Shell(monkeypatch, capsys, tmp_path)


def rows(count: int, **fields: str) -> Path:
    path = Path("rows.jsonl")
    lines = [
        {"prompt": f"question {n}?", **{key: f"{value} {n}" for key, value in fields.items()}}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("method", plugin_names(prefloop.methods))
def test_every_methods_recipe_passes_the_check(shell: Shell, method: str) -> None:
    code, out, _ = shell("new", "--method", method)
    assert (code, out) == (
        0,
        f"recipe in {method}.yaml; next: prefloop run {method}.yaml\n",
    )
    assert shell("check", f"{method}.yaml")[0] == 0
    for section in ("model", "data", "method", "loop", "train", "evaluate"):
        assert "\n# " in Path(f"{method}.yaml").read_text().partition(f"\n{section}:")[0]


def test_without_options_and_without_a_terminal_nobody_is_asked(shell: Shell) -> None:
    assert shell("new")[0] == 0
    assert load_recipe("ial.yaml").judge is not None


def test_on_a_terminal_it_asks_and_an_empty_answer_takes_the_default(shell: Shell) -> None:
    answers = iter(["arop", "", "", "", ""])
    shell.monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    shell.monkeypatch.setattr("typer.prompt", lambda text, default, err: next(answers) or default)
    assert shell("new", "asked.yaml")[0] == 0
    assert yaml.safe_load(Path("asked.yaml").read_text())["method"]["name"] == "arop"
    assert next(answers, None) is None


def test_data_of_ones_own_are_counted_and_some_held_out(shell: Shell) -> None:
    path = rows(40, response="answer")
    assert shell("new", "--train", str(path), "-q") == (
        0,
        "recipe in ial.yaml; next: prefloop run ial.yaml\n",
        "",
    )
    loaded = load_recipe("ial.yaml")
    assert (loaded.data.holdout, loaded.loop.prompts_per_round) == (8, 32)


def test_fewer_prompts_than_were_asked_for_are_noted(shell: Shell) -> None:
    path = rows(60, response="answer")
    noted = f"note: {path} has 48 prompts to train on besides the 12 held out; a round takes these, not 500\n"
    words = ("new", "--train", str(path), "--force", "--prompts")
    assert noted in shell(*words, "500")[2]
    assert "held out" not in shell(*words, "48")[2]


def test_prompts_to_evaluate_on_leave_all_others_to_train_on(shell: Shell) -> None:
    path = rows(40, response="answer")
    words = ("new", "--train", str(path), "--eval", str(path), "--prompts")
    assert "40 prompts to train on; a round takes these, not 100" in shell(*words, "100")[2]
    loaded = load_recipe("ial.yaml")
    assert (loaded.data.holdout, loaded.data.eval) == (0, str(path))
    assert loaded.loop.prompts_per_round == 40


def test_labelled_pairs_are_trained_on_as_they_are(shell: Shell) -> None:
    path = rows(10, chosen="good", rejected="bad")
    assert shell("new", "--method", "dpo", "--train", str(path))[0] == 0
    assert load_recipe("dpo.yaml").method.needs_pairs


def test_a_judge_may_come_with_its_options(shell: Shell) -> None:
    assert shell("new", "--method", "ppo", "--judge", "{name: rules, max_words: 20}")[0] == 0
    assert load_recipe("ppo.yaml").model_dump()["judge"]["max_words"] == 20


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (("--method", "dpoo"), "did you mean 'dpo'"),
        (("--judge", "rewards"), "no judge 'rewards'"),
        (("--judge", "[1]"), "neither a judge's name nor options"),
        (("--model", "./nowhere"), "no folder ./nowhere"),
        (("--train", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--train", "rows.jsonl"), "no target response"),
        (("--method", "arop", "--train", "few.jsonl"), "too few prompts (3)"),
        (("mine.txt",), "does not end in .yaml"),
        (("recipes/mine.yaml",), "exists"),
    ],
)
def test_what_could_not_run_is_one_sentence_and_no_file(
    shell: Shell, words: tuple[str, ...], saying: str
) -> None:
    rows(20)
    Path("few.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    before = Path("recipes/mine.yaml").read_text()
    code, out, err = shell("new", *words)
    assert (code, out) == (2, "")
    assert saying in err
    assert len(err.splitlines()) == 1
    assert sorted(str(path) for path in Path().rglob("*.y*ml")) == ["recipes/mine.yaml"]
    assert sorted(Path().glob(".*")) == []
    assert Path("recipes/mine.yaml").read_text() == before


def test_force_writes_over_a_file(shell: Shell) -> None:
    assert shell("new", "recipes/mine.yaml", "--force")[0] == 0
    assert load_recipe("recipes/mine.yaml").loop.rounds == 2


def test_the_main_help_names_it_first(shell: Shell) -> None:
    assert next(iter(cli.app.registered_commands)).callback is not None
    assert shell("-h")[1].partition("Commands:")[2].split()[0] == "new"
