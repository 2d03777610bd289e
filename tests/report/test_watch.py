"""Watching a run: what it said so far, where it is, and that the watcher leaves when it does."""

import fcntl
import io
import threading
from pathlib import Path

import pytest
from rich.console import Console

from prefloop.errors import RunFolderError
from prefloop.report import watch
from prefloop.report.watch import _Progress, is_running, watch_run
from prefloop.run.chunks import Journal
from prefloop.run_folder import open_run, read_run
from tests.report.conftest import RECIPE, make_run, plain_text, write_round


def watched(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=80)
    watch_run(folder, console, seconds=0.01)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_has_ended_is_told_and_left(made_run: Path) -> None:
    lines = watched(made_run).splitlines()
    assert lines[0].startswith("begun    20")
    assert lines[1] == "round 0  train       3 pairs, 2 steps  4.0 s"
    assert "round 0  guard       distinct_2 fell to half of the start's" in lines
    assert any(line.startswith("ended    20") for line in lines)
    assert any(line.startswith("score  ") for line in lines)
    assert "is not running" not in lines[-1]


def test_a_run_that_was_killed_is_said_not_to_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    diary = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(diary[:-1]))
    assert f"{run} is not running; the command that began it goes on with it" in watched(run)


def test_a_run_is_followed_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says the first thing before the run has ended, and the last one after."""
    folder = tmp_path / "run"
    console = Console(file=io.StringIO(), width=80)
    slept = threading.Event()
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: slept.set())
    with open_run(folder, RECIPE) as run:
        run.event("begin")
        assert is_running(folder)
        follower = threading.Thread(target=watch_run, args=(folder, console))
        follower.start()
        assert slept.wait(10)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert said.startswith("begun")
        run.event("stage", round=0, stage="pairs", pairs=1, rejects=2, seconds=3.0)
        run.event("end")
    follower.join(10)
    assert not is_running(folder)
    assert "pairs       1 pair, 2 rejects  3.0 s" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_line_of_now_says_stage_place_and_loss(tmp_path: Path) -> None:
    recipe = RECIPE.replace("chunk_size: 64", "chunk_size: 2")
    with open_run(tmp_path / "run", recipe) as run:
        now = _Progress(read_run(run.path))
        assert now.line() == "loading"
        round_dir = run.round(0)
        journal = Journal(round_dir.path, "candidates")
        assert now.line() == "round 0  candidates  chunk 0 of 2"
        journal.append([])
        assert now.line().startswith("round 0  candidates  chunk 1 of 2, ")
        assert now.line().endswith(" s left")
        round_dir.finish("candidates")
        write_round(round_dir, ["a", "b", "c"], plain_text)
        (round_dir.path / "train.done.json").unlink()
        (round_dir.path / "candidates.progress.json").write_text('{"chunks": 2}')
        with (round_dir.train / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "lo')
        assert now.line() == "round 0  train  step 2 of 2, loss 0.500"


def test_looking_whether_a_run_is_on_does_not_get_into_its_way(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", RECIPE):
        pass
    assert not is_running(tmp_path / "run")
    assert not is_running(tmp_path)
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(RunFolderError, match=r"no recipe\.yaml"):
        watched(tmp_path)
