"""The win rate during training: it changes nothing, ends in the round's own, and outlasts a kill."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from rich.console import Console

from prefloop.errors import RecipeError
from prefloop.evaluate.curves import curves, steps_to_fraction, win_rate_curve
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_recipe
from prefloop.recipe.options import LaunchOptions
from prefloop.records import CurvePoint, Prompt
from prefloop.report.summary import show_curve, show_run
from prefloop.run.held_out import TrainingCurve
from prefloop.run.loop import run
from prefloop.run_folder import read_run
from prefloop.train.trainer import Trainer
from tests.run.test_loop import OPEN

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")

SHORT = {"max_new_tokens": 6}
AROP = {"name": "arop", "sampling": SHORT, "gates": OPEN}


def draws_and_counts(prompt: Prompt, responses: list[str]) -> list[float]:
    """A judge that draws from the random numbers that training draws from, and does not use them.

    Hardly two texts have one score, so that a policy that has moved is seen to have.
    """
    torch.rand(3)
    return [float(crc32(text.encode())) / 2**32 for text in responses]


def recipe(model_folder: Path, **changes: Any) -> Recipe:
    """Two rounds of three and six steps, with dropout, so that training draws random numbers."""
    sections: dict[str, Any] = {
        "name": "curve",
        "model": {
            "source": str(model_folder),
            "dtype": "float32",
            "device": "cpu",
            "lora": {"dropout": 0.1},
        },
        "method": {"name": "ial", "sampling": SHORT, "advice": SHORT, "gates": {"cut_off": False}},
        "judge": {"name": "python", "function": f"{__name__}:draws_and_counts"},
        "loop": {"rounds": 2, "prompts_per_round": 6},
        "generate": {"chunk_size": 3},
        "train": {"epochs": 1, "lr": 1e-2, "batch_size": 2, "micro_batch_size": 2, "save_every": 2},
        "evaluate": {"prompts": 5, "every_steps": 1, "introspection": False},
        "guard": {"min_stop_rate": 0.0, "max_kl": 1e9},
    }
    for section, options in changes.items():
        merged = isinstance(options, dict) and "name" not in options
        sections[section] = {**sections[section], **options} if merged else options
    return Recipe.model_validate(sections)


def play(recipe: Recipe, folder: Path) -> Path:
    run(recipe, folder, Console(file=StringIO()))
    return folder


@pytest.fixture(scope="module")
def unbroken(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(recipe(model_folder), tmp_path_factory.mktemp("runs") / "unbroken")


def what_counts(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".jsonl", ".safetensors") and path.name != "events.jsonl"
    }


def test_each_step_has_its_point_and_a_rounds_last_one_is_the_rounds_win_rate(
    unbroken: Path,
) -> None:
    found = read_run(unbroken)
    points = win_rate_curve(found)
    assert [(p.round, p.step) for p in points] == [(0, n) for n in (1, 2, 3)] + [
        (1, n) for n in range(4, 10)
    ]
    for round_dir, last in ((0, points[2]), (1, points[-1])):
        measures = next(r for r in found.results() if r.round == round_dir).measures
        assert last.win_rate == measures["win_rate"]
        assert (last.low, last.high) == (measures["win_rate_low"], measures["win_rate_high"])
        assert last.score == measures["score"]
        assert last.prompts == 5
    assert len({p.score for p in points}) > 4, "the policy moves from step to step"


def test_training_is_the_same_with_it_and_without(
    unbroken: Path, model_folder: Path, tmp_path: Path
) -> None:
    plain = play(recipe(model_folder, evaluate={"every_steps": 0}), tmp_path / "plain")
    mine = what_counts(unbroken)
    assert {name for name in mine if name.endswith("curve.jsonl")} == {
        "rounds/0000/curve.jsonl",
        "rounds/0001/curve.jsonl",
    }
    assert what_counts(plain) == {
        name: data for name, data in mine.items() if not name.endswith("curve.jsonl")
    }


@pytest.mark.parametrize("killed_at", [2, 5, 6, 8])
def test_a_killed_training_goes_on_to_the_same_curve(
    unbroken: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    step, calls = Trainer._step, []

    def killed(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return step(*given, **options)

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            play(recipe(model_folder), folder)
    before = len(win_rate_curve(read_run(folder)))
    assert before == killed_at - 1
    made: list[int] = []
    right = TrainingCurve._point

    def counted(self: TrainingCurve, step: int) -> CurvePoint:
        made.append(step)
        return right(self, step)

    monkeypatch.setattr(TrainingCurve, "_point", counted)
    play(recipe(model_folder), folder)
    assert made == list(range(before + 1, 10)), "a point that was there is not measured again"
    assert what_counts(folder) == what_counts(unbroken)


def test_a_point_that_was_being_measured_is_not_lost(
    unbroken: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: TrainingCurve, step: int) -> CurvePoint:
        if step == 5:
            raise KeyboardInterrupt
        return right(self, step)

    right, folder = TrainingCurve._point, tmp_path / "killed"
    # With a checkpoint at each step: one of step 5 would leave its point out for ever.
    often = recipe(model_folder, train={"save_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(TrainingCurve, "_point", killed)
        with pytest.raises(KeyboardInterrupt):
            play(often, folder)
    play(often, folder)
    assert win_rate_curve(read_run(folder)) == win_rate_curve(read_run(unbroken))


def test_every_fourth_step_counts_over_the_rounds(
    unbroken: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder = play(recipe(model_folder, evaluate={"every_steps": 4}), tmp_path / "fourth")
    found = win_rate_curve(read_run(folder))
    assert found == [p for p in win_rate_curve(read_run(unbroken)) if p.step in (4, 8)]


def test_a_judge_that_compares_with_the_start_compares_with_the_start(
    model_folder: Path, tmp_path: Path
) -> None:
    # Before the first update it has no verdict, so there is a score and nothing to win against.
    changes: dict[str, Any] = {
        "method": AROP,
        "judge": {"name": "implicit"},
        "loop": {"rounds": 1, "prompts_per_round": 4},
    }
    folder = play(recipe(model_folder, **changes), tmp_path / "implicit")
    points = win_rate_curve(read_run(folder))
    assert points
    assert all(p.win_rate is None and p.prompts == 0 for p in points)
    result = next(r for r in read_run(folder).results() if r.round == 0)
    assert points[-1].score == pytest.approx(result.measures["score"], rel=1e-3)
    assert points[-1].score != 0
    assert steps_to_fraction(points) is None


def test_evaluations_read_both_curves_and_when_ninety_percent_was_reached(unbroken: Path) -> None:
    found = curves(read_run(unbroken))
    logged = (unbroken / "rounds/0000/train/metrics.jsonl").read_text().splitlines()
    assert found["training"]["0"] == [json.loads(line) for line in logged]
    rates = {p["step"]: p["win_rate"] for p in found["win_rate"]}
    first = min(step for step, rate in rates.items() if rate >= 0.9 * max(rates.values()))
    assert found["steps_to_90"] == first


def test_show_prints_the_curve(unbroken: Path) -> None:
    out = StringIO()
    show_run(unbroken, Console(file=out, width=100), pair=None, count=0)
    lines = out.getvalue().splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("step"))
    assert [line.split()[:2] for line in lines[head + 1 : head + 4]] == [
        ["1", "0"],
        ["2", "0"],
        ["3", "0"],
    ]
    assert any(line.startswith("steps to 90% of the highest win rate: ") for line in lines)


def test_a_long_curve_is_thinned_and_keeps_its_last_point() -> None:
    points = [
        CurvePoint(round=0, step=n, win_rate=0.5, low=0.4, high=0.6, score=1.0, prompts=4)
        for n in range(1, 51)
    ]
    out = StringIO()
    show_curve(points, Console(file=out, width=100))
    lines = out.getvalue().splitlines()[2:-1]
    assert len(lines) <= 12
    assert lines[-1].split()[0] == "50"


def test_what_it_cannot_do_is_refused_in_one_sentence(model_folder: Path, tmp_path: Path) -> None:
    several = recipe(model_folder, launch=LaunchOptions(processes=2))
    for refused, why in (
        (several, "under launch"),
        (
            recipe(model_folder, method=AROP, judge=None),
            "needs a judge",
        ),
    ):
        with pytest.raises(RecipeError, match=why):
            check_recipe(refused)
        with pytest.raises(RecipeError, match=why):
            play(refused, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
