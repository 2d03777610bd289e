"""Which weights a run keeps, what can be freed, and that what is left is whole; training that ends early."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from prefloop.cli import app
from prefloop.errors import RecipeError, RunFolderError
from prefloop.evaluate.subjects import find_subject
from prefloop.evaluate.win_rates import has_stalled
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_curve
from prefloop.report.html import write_report
from prefloop.run.clean import clean_run
from prefloop.run.loop import run
from prefloop.run.publish import merge_policy
from prefloop.run.verify import verify_run
from prefloop.run_folder import read_run
from tests.run.test_loop import OPEN, what_counts

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")

SHORT = {"max_new_tokens": 4}


def recipe(model_folder: Path, **changes: Any) -> Recipe:
    sections: dict[str, Any] = {
        "name": "clean",
        "model": {"source": str(model_folder), "dtype": "float32", "device": "cpu"},
        "method": {"name": "arop", "sampling": SHORT, "gates": OPEN},
        "judge": {"name": "similarity"},
        "data": {"limit": 48},
        "loop": {"rounds": 3, "prompts_per_round": 2, "carry_optimizer": True},
        "train": {"lr": 1e-2, "batch_size": 2, "micro_batch_size": 2},
        "evaluate": {"prompts": 2, "introspection": False},
        "guard": {"min_stop_rate": 0.0, "max_kl": 1e9},
    }
    for section, options in changes.items():
        sections[section] = {**sections.get(section, {}), **options}
    return Recipe.model_validate(sections)


def play(recipe: Recipe, folder: Path) -> Path:
    run(recipe, folder, Console(file=StringIO()))
    return folder


@pytest.fixture(scope="module")
def untouched(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(recipe(model_folder), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def finished(untouched: Path, tmp_path: Path) -> Path:
    """A run of three rounds, to take weights from."""
    return shutil.copytree(untouched, tmp_path / "run")


def rounds_with_weights(folder: Path) -> list[str]:
    return sorted(p.parent.parent.name for p in folder.glob("rounds/*/policy/*.safetensors"))


def test_clean_shows_first_and_frees_only_what_no_one_reads(
    finished: Path, model_folder: Path, tmp_path: Path
) -> None:
    before = what_counts(finished)
    shown = clean_run(finished)
    assert what_counts(finished) == before
    assert [part.what for part in shown] == ["policy and training state"] * 2 + ["training state"]
    freed = clean_run(finished, apply=True)
    assert [part.size for part in freed] == [part.size for part in shown]
    gone = before.keys() - what_counts(finished).keys()
    assert gone == {
        str(p.relative_to(finished))
        for part in shown
        for p in part.files
        if p.suffix == ".safetensors"
    }
    assert rounds_with_weights(finished) == ["0002"]
    assert clean_run(finished, apply=True) == []
    # Still whole, and good for all that is done with a run.
    assert verify_run(finished).damaged == []
    after = what_counts(finished)
    play(recipe(model_folder), finished)
    assert what_counts(finished) == after
    write_report([finished], tmp_path / "report.html")
    assert merge_policy(finished, tmp_path / "merged").is_dir()
    for subject in (f"{finished}", f"{finished}@2", f"{finished}@start"):
        find_subject(subject).weights_hash()
    with pytest.raises(RunFolderError, match=r"no policy of round 0; it has 2"):
        find_subject(f"{finished}@0")
    with pytest.raises(RunFolderError, match=r"was freed \(train.keep_last, or prefloop clean\)"):
        read_run(finished).round(0).verify_policy()


def test_a_killed_clean_is_made_again(finished: Path) -> None:
    first = read_run(finished).round(0)
    first.sealed("train").release(first.weights())
    assert verify_run(finished).damaged == []
    assert len(clean_run(finished, apply=True)) == 3
    assert rounds_with_weights(finished) == ["0002"]


def test_damage_is_not_freed_but_named(finished: Path) -> None:
    (finished / "rounds/0000/policy/adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(RunFolderError, match="bytes long and not"):
        clean_run(finished, apply=True)


def test_the_command_says_how_much_and_needs_a_word_to_delete(finished: Path) -> None:
    shown = CliRunner().invoke(app, ["clean", str(finished)])
    assert "could be freed; --apply does so" in shown.output
    as_json = json.loads(CliRunner().invoke(app, ["clean", str(finished), "--json"]).output)
    assert as_json["bytes"] == sum(Path(name).stat().st_size for name in as_json["files"])
    assert CliRunner().invoke(app, ["clean", str(finished), "--apply"]).output.endswith("freed\n")


def test_an_unfinished_run_is_left_alone(finished: Path) -> None:
    (finished / "policy.done.json").unlink()
    with pytest.raises(RunFolderError, match="has not ended"):
        clean_run(finished, apply=True)


def test_keep_last_frees_on_the_way_and_changes_no_weight(
    finished: Path, model_folder: Path, tmp_path: Path
) -> None:
    lean = play(recipe(model_folder, train={"keep_last": 1}), tmp_path / "lean")
    assert rounds_with_weights(lean) == ["0002"]
    everything, left = what_counts(finished), what_counts(lean)
    assert left == {name: everything[name] for name in left}
    assert verify_run(lean).damaged == []
    # keep_last is no part of what makes the run: the same folder goes on with another.
    play(recipe(model_folder, train={"keep_last": 2}), lean)


def test_keep_last_spares_the_best_round(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefloop.run import loop

    real = loop.answer_measures
    scores = iter([1.0, 9.0, 5.0, 4.0])

    def measured(*args: Any, **more: Any) -> dict[str, float | None]:
        return {**real(*args, **more), "score": next(scores)}

    monkeypatch.setattr(loop, "answer_measures", measured)
    chosen = recipe(model_folder, train={"keep_last": 1}, guard={"action": "best_round"})
    folder = play(chosen, tmp_path / "run")
    assert rounds_with_weights(folder) == ["0000", "0002"]
    assert read_run(folder).published.read()["round"] == 0
    clean_run(folder, apply=True)
    assert rounds_with_weights(folder) == ["0000"]


# Early stopping.


@pytest.mark.parametrize(
    ("rates", "patience", "threshold", "stalled"),
    [
        ([0.5, 0.6, 0.6], 1, 0.0, True),
        ([0.5, 0.6, 0.6], 2, 0.0, False),
        ([0.5, 0.6, 0.55, 0.61], 2, 0.0, False),
        ([0.5, 0.6, 0.55, 0.61], 2, 0.05, True),
        ([0.5, 0.52, 0.54, 0.62], 2, 0.05, True),
        ([0.5, 0.56, 0.62, 0.60], 2, 0.05, False),
        ([], 1, 0.0, False),
    ],
)
def test_patience_counts_win_rates_without_a_better_one(
    rates: list[float], patience: int, threshold: float, stalled: bool
) -> None:
    assert has_stalled(rates, patience, threshold) is stalled


def test_training_and_the_run_end_where_the_curve_has_stalled(
    model_folder: Path, tmp_path: Path
) -> None:
    # No weight moves, so that no win rate is better than the first one.
    chosen = recipe(
        model_folder,
        loop={"prompts_per_round": 6, "carry_optimizer": False},
        train={"lr": 1e-30, "save_every": 1},
        evaluate={"every_steps": 1, "early_stopping_patience": 1},
    )
    folder = play(chosen, tmp_path / "run")
    rounds = read_run(folder).rounds()
    assert [round_dir.steps() for round_dir in rounds] == [2]
    assert (folder / "policy").is_dir()
    kinds = [event["event"] for event in read_run(folder).events()]
    assert "early stop" in kinds
    after = what_counts(folder)
    play(chosen, folder)
    assert what_counts(folder) == after


def test_patience_without_a_curve_is_refused(model_folder: Path) -> None:
    with pytest.raises(RecipeError, match="counts win rates during training"):
        check_curve(recipe(model_folder, evaluate={"early_stopping_patience": 2}))
