"""The code in docs/adding.md runs as it stands there, and keeps the contracts when it is put into the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

import prefloop.judges
import prefloop.methods
from prefloop.config import find_plugin
from prefloop.evaluate import measures
from prefloop.evaluate.measures import Measure, Subject
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.templates import PromptSet
from prefloop.judges import EMPTY, Judge, NoVerdict
from prefloop.judges.python import DECLINED, Python
from prefloop.methods import Method
from prefloop.records import Candidates, Message, Pair, Prompt, Response
from prefloop.train.losses import GroupLogps

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/adding.md"
NAMES = ("my_judges", "mentions", "longer", "brevity")


def blocks() -> dict[str, str]:
    """The page's files, by name."""
    text = PAGE.read_text("utf-8")
    found = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", text, re.M | re.S))
    assert tuple(found) == NAMES
    return found


def prompt(text: str) -> Prompt:
    return Prompt(id="p", messages=(Message(role="user", content=text),))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of the user's with the page's files in it."""
    home = tmp_path / "added"
    home.mkdir()
    (home / "__init__.py").touch()
    for name, code in blocks().items():
        (home / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield "added"
    for name in [name for name in sys.modules if name.partition(".")[0] == "added"]:
        del sys.modules[name]


def test_the_function_judges(package: str) -> None:
    judge = Python(function=f"{package}.my_judges:brief")
    judge.check()
    opened = judge.open(None, PromptSet("compact"))
    groups = [["one two", "one"], ["one", "two"]]
    assert opened.score([prompt("Say it"), prompt("List some")], groups) == [(-2, -1), DECLINED]


def test_the_judge_scores_and_refuses_empty_answers(package: str) -> None:
    kind = find_plugin(prefloop.judges, f"{package}.mentions", Judge, "judge")
    opened = kind(shortest=3).open(None, PromptSet("compact"))
    (verdict,) = opened.score([prompt("why grass green")], [["grass is green", "no"]])
    assert not isinstance(verdict, NoVerdict)
    assert verdict == (pytest.approx(2 / 3), 0)
    assert opened.score([prompt("why")], [["", "x"]]) == [EMPTY]


def test_the_method_pairs_and_has_a_loss(package: str) -> None:
    kind = find_plugin(prefloop.methods, f"{package}.longer", Method, "method")
    method = kind()
    answers = {"draft_a": Response(text="short"), "draft_b": Response(text="a longer one")}
    (pair,) = method.pair([Candidates(prompt=prompt("q"), responses=answers)], 0)
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected) == ("a longer one", "short")
    zeros = {role: torch.zeros(2) for role in kind.roles}
    ones = {role: torch.ones(2) for role in kind.roles}
    loss = method.loss(GroupLogps(zeros, zeros, ones, torch.zeros(2)), 0.0).loss_B
    assert loss.tolist() == pytest.approx([0.6931] * 2, abs=1e-4)


def test_the_measure_measures(package: str, tmp_path: Path) -> None:
    kind = find_plugin(measures, f"{package}.brevity", Measure, "measure")
    engine = FakeEngine(lambda request, seed: "three words here")
    subject = Subject("s", engine, None, None, None, None, tmp_path, 0)
    outcome = kind().run(subject)
    assert outcome.estimates["words"].value == 3
    assert len(outcome.items) == len(import_module(f"{package}.brevity").QUESTIONS)


@pytest.mark.slow
def test_put_into_the_package_each_keeps_its_contract_with_no_other_file_touched(
    tmp_path: Path,
) -> None:
    """Every check of a contract finds the new file by itself; none is left out."""
    for name in ("prefloop", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for name, room in (("mentions", "judges"), ("longer", "methods"), ("brevity", "measures")):
        home = tmp_path / "prefloop" / ("evaluate/measures" if room == "measures" else room)
        (home / f"{name}.py").write_text(blocks()[name])
    files = [f"tests/contract/test_{room}.py" for room in ("judges", "methods", "measures")]
    wanted = ["-k", "mentions or longer or brevity or there_are"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *files,
            "tests/contract/test_options_read.py",
            *wanted,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 25
    assert "skipped" not in done.stdout
