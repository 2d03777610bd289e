"""Experiment trackers: what they are told of a run, and that none of them can end one."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

import prefloop.run.tracking
from prefloop.errors import RecipeError
from prefloop.recipe import Recipe
from prefloop.run_folder import RunDir
from tests.run.test_loop import LIGHT, play, recipe

TRACK = {"report_to": ["swanlab"], "project": "mine", "pairs": 2}


class Notebook(GeneralTracker):
    """A tracker of accelerate's that keeps what it is told; `fails` names what it cannot do."""

    name = "swanlab"
    requires_logging_directory = False
    made: list[Notebook]
    fails: frozenset[str] = frozenset()

    def __init__(self, run_name: str, **keywords: Any) -> None:
        super().__init__()
        self.project, self.keywords = run_name, keywords
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.tables: dict[str, tuple[list[str], list[list[Any]], int]] = {}
        self.configuration: dict[str, Any] = {}
        self.reports: list[Path] = []
        self.ended = False
        self.made.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def _do(self, what: str) -> None:
        if what in self.fails:
            raise ConnectionError(f"{what} fails")

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._do("log")
        assert step is not None
        self.lines.append((step, values))

    def log_table(self, name: str, columns: Any, data: Any, step: int) -> None:
        self._do("log_table")
        self.tables[name] = (columns, data, step)

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    kind = type("Notebook", (Notebook,), {"made": []})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "swanlab", kind)
    attach = lambda tracker, page: tracker.reports.append(page)  # noqa: E731
    monkeypatch.setitem(prefloop.run.tracking._ATTACHING, "swanlab", attach)
    return kind


def tracked(model_folder: Path, **changes: Any) -> Recipe:
    light = {**LIGHT, "every_round": True}
    return recipe(model_folder, "arop", track={**TRACK, **changes}, evaluate=light)


def test_a_run_is_told_by_steps_rounds_pairs_and_its_report(
    model_folder: Path, tmp_path: Path, notebook: type[Notebook]
) -> None:
    outcome = play(tracked(model_folder), tmp_path / "run")
    [book] = notebook.made
    assert (book.project, book.ended) == ("mine", True)
    steps = [step for step, values in book.lines if "train/loss" in values]
    assert steps == list(range(len(steps)))
    by_round = [(step, v["eval/round"]) for step, v in book.lines if "eval/round" in v]
    assert by_round == [(0, -1), (len(steps) // 2, 0), (len(steps), 1)]
    head, table, _ = book.tables["rounds"]
    assert head == ["measure", "start", "0", "1", "in words"]
    words = {row[0]: row[-1] for row in table}
    assert words["train_M"] == "M, what the reward margin R must exceed, mean"
    assert set(words) == {name for result in outcome.results for name in result.measures}
    pairs = RunDir(tmp_path / "run").pairs()
    for number, (_, made) in enumerate(pairs):
        _, rows, _ = book.tables[f"pairs/round_{number}"]
        assert [row[0] for row in rows] == [pair.id for pair in islice(made, 2)]
    assert book.reports == [tmp_path / "run/report.html"]
    assert book.reports[0].is_file()


def test_the_recipe_goes_there_without_the_users_folders(
    model_folder: Path, tmp_path: Path, notebook: type[Notebook]
) -> None:
    play(tracked(model_folder), tmp_path / "run")
    configuration = notebook.made[0].configuration
    assert configuration["loop.rounds"] == 2
    assert configuration["model.source"] == model_folder.name
    assert str(model_folder.parent) not in str(configuration)


@pytest.mark.parametrize("what", ["log", "log_table"])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    model_folder: Path,
    tmp_path: Path,
    notebook: type[Notebook],
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    notebook.fails = frozenset({what})
    with caplog.at_level(logging.WARNING):
        outcome = play(tracked(model_folder), tmp_path / "run")
    assert len(outcome.results) == 3
    assert caplog.text.count(f"{what} fails") == 1
    [book] = notebook.made
    assert (book.lines == []) == (what == "log")
    assert book.tables == {}


def test_a_tracker_that_cannot_be_opened_stops_the_run_before_it_begins(
    model_folder: Path, tmp_path: Path, notebook: type[Notebook]
) -> None:
    notebook.fails = frozenset({"start"})
    with pytest.raises(RecipeError, match=r"swanlab cannot be opened .*start fails.*leave it out"):
        play(tracked(model_folder), tmp_path / "run")
    assert not (tmp_path / "run/rounds").exists()


def test_a_run_that_goes_on_goes_on_in_its_tracker_too(
    model_folder: Path, tmp_path: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", notebook)
    once = tracked(model_folder, report_to="wandb", run_name="named")
    play(once, tmp_path / "run")
    for name in ("policy.done.json", "rounds/0001/train.done.json", "rounds/0001/result.done.json"):
        (tmp_path / "run" / name).unlink()
    play(once, tmp_path / "run")
    play(once, tmp_path / "run")  # it has ended, and there is nothing to tell
    first, again = notebook.made
    assert first.keywords["name"] == "named"
    assert first.keywords["id"] == again.keywords["id"]
    assert again.keywords["resume"] == "allow"
    assert (bool(first.configuration), again.configuration) == (True, {})
    assert [v["eval/round"] for _, v in first.lines if "eval/round" in v] == [-1, 0, 1]
    assert [v["eval/round"] for _, v in again.lines if "eval/round" in v] == []


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["wandb"], ("wandb",)),
        ("wandb", ("wandb",)),
        ("none", ()),
        ({"report_to": "none"}, ()),
        ({"report_to": ["mlflow", "wandb"]}, ("mlflow", "wandb")),
    ],
)
def test_trackers_are_named_as_people_are_used_to(
    model_folder: Path, given: Any, names: tuple[str, ...]
) -> None:
    assert recipe(model_folder, "arop", track=given).track.report_to == names
