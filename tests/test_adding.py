"""The code in docs/adding.md runs as it stands there."""

from __future__ import annotations

import re
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

PAGE = Path(__file__).parents[1] / "docs/adding.md"
NAMES = ("my_judges", "mentions", "longer", "brevity")


def prompt(text: str) -> Prompt:
    return Prompt(id="p", messages=(Message(role="user", content=text),))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of the user's with the page's files in it."""
    home = tmp_path / "added"
    home.mkdir()
    (home / "__init__.py").touch()
    blocks = re.findall(
        r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S
    )
    assert tuple(name for name, _ in blocks) == NAMES
    for name, code in blocks:
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
