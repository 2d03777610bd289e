"""Playing cells: order, waiting, failures, going on; without a model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefloop.compare.file import Cell, Comparison, cells
from prefloop.compare.run import describe_reuse, play, start_process
from prefloop.errors import RunFolderError
from prefloop.run_folder import RunDir, alone_in, open_run
from tests.compare.test_compare_reuse import base


def all_cells(
    folder: Path, variants: dict[str, Any], seeds: tuple[int, ...] = (0, 1)
) -> list[Cell]:
    values = {**base(Path("model")), "sft": None}
    found, _ = cells(Comparison(base=values, seeds=seeds, variants=variants), folder)
    return found


class Stage:
    """Cells on a stage of our own: each takes `length` looks, then has all manifests, or fails."""

    def __init__(self, length: int = 2, failing: tuple[str, ...] = ()) -> None:
        self.length, self.failing = length, failing
        self.begun: list[str] = []
        self.at_once: list[int] = []
        self.living: set[str] = set()

    def start(self, cell: Cell, jobs: int) -> "Actor":
        self.begun.append(cell.name)
        self.living.add(cell.name)
        self.at_once.append(len(self.living))
        return Actor(self, cell)


class Actor:
    def __init__(self, stage: Stage, cell: Cell) -> None:
        self.stage, self.cell, self.looks, self.told = stage, cell, 0, False

    def poll(self) -> int | None:
        self.looks += 1
        if self.looks < self.stage.length:
            return None
        self.stage.living.discard(self.cell.name)
        if self.cell.name in self.stage.failing:
            (self.cell.folder / "console.log").write_text("begun\nprefloop: no luck today\n")
            return 2
        finish(self.cell)
        return 0

    def terminate(self) -> None:
        self.told = True

    def wait(self, timeout: float | None = None) -> int:
        return 0


def finish(cell: Cell) -> None:
    run = RunDir(cell.folder)
    for number, stages in ((-1, ("answers", "introspection")), (0, ("candidates", "ranked"))):
        round_dir = run.round(number)
        for stage in stages:
            (round_dir.path / f"{stage}.jsonl").touch()
            (round_dir.path / "rejects.jsonl").touch()
            round_dir.finish(stage, rejects={}, seconds=1.0)
    (cell.folder / "policy").mkdir()


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefloop.compare.run._POLL_SECONDS", 0.0)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


LOSSES = {"a": {}, "b": {"method.gamma": 1.0}, "c": {"method.gamma": 2.0}}


def test_cells_that_would_do_the_same_work_wait_for_the_first_one(tmp_path):
    stage = Stage()
    lines: list[str] = []
    found = all_cells(tmp_path, LOSSES)
    assert play(found, jobs=3, say=lines.append, start=stage.start) == {}
    # Both seeds' firsts together; the others only when they have something to take.
    assert stage.begun[:2] == ["a seed 0", "a seed 1"]
    places = [line.partition(":")[0] + line.partition(":")[2][:6] for line in lines]
    for seed in (0, 1):
        for other in "bc":
            begun = places.index(f"{other} seed {seed} begin")
            assert places.index(f"a seed {seed} done ") < begun
    assert sorted(stage.begun) == sorted(cell.name for cell in found)
    assert "b seed 0: begins, answers, introspection, candidates, ranked done before" in lines


def test_no_more_cells_are_played_at_once_than_asked_for(tmp_path):
    stage = Stage(length=3)
    variants = {name: {"method.advice": {"max_new_tokens": n}} for n, name in enumerate("abcd", 1)}
    values = {**base(Path("model")), "sft": None, "evaluate": {"prompts": 2, "sampling": {}}}
    comparison = Comparison(base=values, seeds=(0, 1, 2), variants=variants)
    play(cells(comparison, tmp_path)[0], jobs=2, say=lambda line: None, start=stage.start)
    assert len(stage.begun) == 12
    assert max(stage.at_once) == 2


def test_a_failing_cell_is_named_with_its_reason_and_the_others_go_on(tmp_path):
    stage = Stage(failing=("a seed 0",))
    lines: list[str] = []
    found = all_cells(tmp_path, LOSSES)
    failed = play(found, jobs=2, say=lines.append, start=stage.start)
    assert list(failed) == ["a seed 0"]
    assert failed["a seed 0"].startswith("no luck today (all it said is in ")
    assert len(stage.begun) == 6
    # It left nothing to take: the next one does the work itself, and leaves it to the last.
    assert "b seed 0: begins" in lines
    assert f"a seed 0: failed: {failed['a seed 0']}" in lines


def test_the_reason_is_that_of_this_attempt_and_a_kill_is_called_one(tmp_path):
    [cell] = all_cells(tmp_path, {"a": {}}, (0,))
    play([cell], jobs=1, say=lambda line: None, start=Stage(failing=(cell.name,)).start)
    for last_words, code, reason in (
        ("", 1, "exit code 1, and no word"),
        ("KeyError: 'x'\n", 1, "KeyError: 'x'"),
        ("round 0: 3 of 9\n", -9, "ended by signal 9"),
    ):

        def start(cell: Cell, jobs: int, words: str = last_words, code: int = code) -> Any:
            with (cell.folder / "console.log").open("a") as log:
                log.write(words)
            return SimpleNamespace(poll=lambda: code)

        failed = play([cell], jobs=1, say=lambda line: None, start=start)
        assert failed[cell.name].startswith(f"{reason} (all it said is in ")


def test_the_same_call_goes_on_with_what_is_missing(tmp_path):
    found = all_cells(tmp_path, LOSSES)
    play(found, jobs=2, say=lambda line: None, start=Stage(failing=("b seed 1",)).start)
    again = Stage()
    assert play(found, jobs=2, say=lambda line: None, start=again.start) == {}
    assert again.begun == ["b seed 1"]
    assert play(found, jobs=2, say=lambda line: None, start=again.start) == {}
    assert again.begun == ["b seed 1"]


def test_a_cell_whose_recipe_has_changed_fails_and_the_others_are_played(tmp_path):
    play(all_cells(tmp_path, LOSSES), jobs=1, say=lambda line: None, start=Stage().start)
    stage = Stage()
    changed = all_cells(tmp_path, {**LOSSES, "b": {"method.gamma": 9.0}, "d": {}})
    failed = play(changed, jobs=1, say=lambda line: None, start=stage.start)
    assert list(failed) == ["b seed 0", "b seed 1"]
    assert "was started with another recipe (method.gamma was 1.0, now 9.0)" in failed["b seed 0"]
    assert stage.begun == ["d seed 0", "d seed 1"]


def test_a_cell_that_cannot_take_what_another_has_done_stops_no_other(tmp_path):
    found = all_cells(tmp_path, {**LOSSES, "other": {"method.advisor": False}}, (0,))
    play(found[:1], jobs=1, say=lambda line: None, start=Stage().start)
    (found[0].folder / "rounds/0000/ranked.jsonl").unlink()
    failed = play(found, jobs=2, say=lambda line: None, start=Stage().start)
    assert list(failed) == ["b seed 0", "c seed 0"]
    assert "ranked.jsonl is gone" in failed["b seed 0"]
    assert (found[3].folder / "policy").is_dir()


def test_one_variant_alone_takes_what_the_others_have_done(tmp_path):
    found = all_cells(tmp_path, LOSSES)
    by_name = {cell.name: cell for cell in found}
    play([by_name["a seed 0"]], jobs=1, say=lambda line: None, start=Stage().start)
    lines: list[str] = []
    chosen = [cell for cell in found if cell.variant == "b"]
    other_cells = [cell for cell in found if cell.variant != "b"]
    play(chosen, jobs=1, say=lines.append, start=Stage().start, other_cells=other_cells)
    assert lines[0] == "b seed 0: begins, answers, introspection, candidates, ranked done before"
    assert "b seed 1: begins" in lines


def test_what_is_being_played_ends_with_the_comparison(tmp_path):
    actors: list[Actor] = []

    def start(cell: Cell, jobs: int) -> Actor:
        if actors:
            raise KeyboardInterrupt
        actors.append(Actor(Stage(length=10**9), cell))
        return actors[0]

    with pytest.raises(KeyboardInterrupt):
        play(all_cells(tmp_path, {"a": {}}), jobs=2, say=lambda line: None, start=start)
    assert actors[0].told


def test_the_plan_can_be_seen_before(tmp_path):
    assert describe_reuse(all_cells(tmp_path, {"a": {}, "b": {"method.gamma": 1.0}}, (0,))) == [
        "a seed 0",
        "b seed 0  shares answers, introspection, candidates, ranked of a seed 0",
    ]


def test_a_comparison_is_played_by_one_process(tmp_path):
    with (
        alone_in(tmp_path, "comparison"),
        pytest.raises(RunFolderError, match="in use by another comparison"),
        alone_in(tmp_path, "comparison"),
    ):
        pass


def test_a_cell_is_an_ordinary_run_in_a_process_of_its_own(tmp_path, monkeypatch):
    """The command is `prefloop run` of the cell's recipe; several at a time share the cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen: dict[str, Any] = {}

    def popen(command: list[str], **options: Any) -> None:
        seen.update(command=command, threads=options["env"].get("OMP_NUM_THREADS"))

    monkeypatch.setattr("subprocess.Popen", popen)
    cell = all_cells(tmp_path, {"a": {}}, (0,))[0]
    cell.folder.mkdir(parents=True)
    start_process(cell, 1)
    folder = str(cell.folder)
    recipe = f"{folder}/recipe.yaml"
    assert seen["command"] == [sys.executable, "-m", "prefloop", "run", recipe, "--out", folder]
    assert seen["threads"] is None
    start_process(cell, 1000)
    assert seen["threads"] == "1"


def test_a_played_folder_holds_the_recipe_that_reproduces_it(tmp_path):
    found = all_cells(tmp_path, {"a": {}}, (0,))
    play(found, jobs=1, say=lambda line: None, start=Stage().start)
    assert (found[0].folder / "recipe.yaml").read_text() == found[0].recipe.dump()
    assert json.loads((found[0].folder / "environment.json").read_text())["versions"]


@pytest.mark.parametrize("began", ["bfloat16", "float32"])
def test_a_comparison_that_goes_on_elsewhere_keeps_its_dtype(tmp_path, began):
    """Under `auto` the first cell's dtype is all cells', whatever this machine's would be."""
    values = {**base(Path("model")), "sft": None}
    values["model"] = {**values["model"], "dtype": "auto"}
    variants = {"a": {}, "b": {"method.gamma": 1.0}, "c": {"model.lora": {"r": 3}}}
    found, _ = cells(Comparison(base=values, seeds=(0,), variants=variants), tmp_path)
    with open_run(found[0].folder, found[0].recipe.dump()) as run:
        run.same_inputs({"model.dtype": began})
    finish(found[0])
    assert play(found[1:], other_cells=found, jobs=1, say=print, start=Stage().start) == {}
    dtypes = [RunDir(cell.folder).inputs().get("model.dtype") for cell in found]
    assert dtypes == [began, began, None], "another adapter decides for itself"


def test_nothing_is_taken_from_a_cell_of_another_dtype(tmp_path):
    values = {**base(Path("model")), "sft": None}
    values["model"] = {**values["model"], "dtype": "auto"}
    found, _ = cells(Comparison(base=values, seeds=(0,), variants=LOSSES), tmp_path)
    for cell, dtype in zip(found, ("bfloat16", "float32"), strict=False):
        with open_run(cell.folder, cell.recipe.dump()) as run:
            run.same_inputs({"model.dtype": dtype})
    finish(found[0])
    lines: list[str] = []
    assert (
        play(found[1:2], other_cells=found[:1], jobs=1, say=lines.append, start=Stage().start) == {}
    )
    assert lines[0] == "b seed 0: begins"
