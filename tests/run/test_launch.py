"""Stages in processes of their own: started, watched, ended together, and their failures in one sentence."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file

from prefloop.config import build
from prefloop.errors import LaunchError, RecipeError, RunFolderError
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_recipe
from prefloop.recipe.options import LaunchOptions
from prefloop.run.launch import Stage, run_processes, working_in
from prefloop.run.loop import make_worker_chunks, run
from prefloop.run.session import Session
from prefloop.run_folder import RoundDir, read_metrics

SAMPLING = {"max_new_tokens": 8}
GATES = {"cut_off": False, "identical": False, "meta_talk": False, "max_length_ratio": None}


def recipe(source: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "launched",
        "model": {"source": str(source), "device": "cpu", "dtype": "float32"},
        "method": {"name": "ial", "sampling": SAMPLING, "advice": SAMPLING, "gates": GATES},
        "judge": {"name": "similarity"},
        "data": {"limit": 32},
        "generate": {"chunk_size": 8},
        "loop": {"rounds": 1, "prompts_per_round": 6},
        "train": {"epochs": 2, "lr": 1e-3, "batch_size": 4, "micro_batch_size": 2, "save_every": 1},
        "evaluate": {"prompts": 1, "introspection": False, "every_round": False},
        "guard": {"min_stop_rate": 0.0},
    }
    for section, options in changes.items():
        both = isinstance(values.get(section), dict) and isinstance(options, dict)
        values[section] = values[section] | options if both else options
    return Recipe.model_validate(values)


def play(recipe: Recipe, folder: Path) -> Path:
    run(recipe, folder, Console(file=StringIO()))
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same_bytes(folder: Path, other: Path) -> None:
    assert files(folder) == files(other)
    for name in files(other):
        if Path(name).suffix in (".safetensors", ".jsonl") and name != "events.jsonl":
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name


# The real thing.


def test_a_round_trained_in_two_processes_leaves_what_one_leaves(model_folder, tmp_path):
    one = play(recipe(model_folder), tmp_path / "one")
    two = play(recipe(model_folder, launch={"processes": 2}), tmp_path / "two")
    assert files(one) | {".workers"} == files(two)
    mine, theirs = (read_metrics(at / "rounds/0000/train/metrics.jsonl") for at in (one, two))
    assert [row["loss"] for row in theirs] == pytest.approx([row["loss"] for row in mine], abs=1e-5)
    assert [row["tokens"] for row in theirs] == [row["tokens"] for row in mine]
    manifests = [json.loads((at / "rounds/0000/train.done.json").read_text()) for at in (one, two)]
    assert manifests[0].keys() == manifests[1].keys()
    before, after = (load_file(at / "policy/adapter_model.safetensors") for at in (one, two))
    for name, weight in before.items():
        assert (weight - after[name]).abs().max() < 1e-4


SHARED = {"generate": {"chunk_size": 2}, "evaluate": {"prompts": 3, "introspection": True}}


def test_processes_that_share_the_prompts_write_what_one_writes(
    model_folder, tmp_path, monkeypatch
):
    """Three chunks of two prompts for two processes, both played here; the second is killed once half-way."""
    one = play(recipe(model_folder, **SHARED), tmp_path / "one")
    shared, made = recipe(model_folder, **SHARED), []

    def work(session: Session, round_dir: RoundDir, stage: str) -> None:
        for rank in (1, 0):
            make_worker_chunks(shared, session.rundir, round_dir.number, stage, rank, 2)
            made.append((round_dir.number, stage, rank))
            if made == [(-1, "answers", 1), (-1, "answers", 0), (-1, "introspection", 1)]:
                raise KeyboardInterrupt

    monkeypatch.setattr(Session, "launch_workers", work)
    with pytest.raises(KeyboardInterrupt):
        play(shared, tmp_path / "two")
    play(shared, tmp_path / "two")
    same_bytes(tmp_path / "two", one)
    assert {stage for _, stage, _ in made} == {"answers", "introspection", "candidates", "ranked"}


@pytest.mark.slow
def test_two_launched_processes_share_the_prompts(model_folder, tmp_path):
    """Training differs in its last bits between one process and two, so only the start and round 0 compare."""
    one = play(recipe(model_folder, **SHARED), tmp_path / "one")
    launch = {"processes": 2, "generate": True}
    two = play(recipe(model_folder, **SHARED, launch=launch), tmp_path / "two")
    for name in (
        "start/answers",
        "start/introspection",
        "0000/candidates",
        "0000/ranked",
        "0000/pairs",
    ):
        file = f"rounds/{name}.jsonl"
        assert (one / file).read_bytes() == (two / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "places"), [("none", ("start", "0000", "0001")), ("fsdp2", ("0000",))]
)
def test_a_killed_process_is_told_of_and_the_run_goes_on_to_the_same_bytes(
    model_folder, tmp_path, sharding, places
):
    """After a supervised round 0, all tuned in full; one process is killed in each of `places`."""
    launched = recipe(
        model_folder,
        model={"tuning": "full"},
        loop={"rounds": int(places[-1]) + 1},
        launch={"processes": 2, "sharding": sharding},
        sft={"batch_size": 16},
    )
    unbroken = play(launched, tmp_path / "unbroken")
    killed = tmp_path / "killed"
    for place in places:
        hunter = hunt(killed, killed / "rounds" / place / "train" / "metrics.jsonl", rank="1")
        with pytest.raises(LaunchError, match=r"process 1 of (sft|train) died without a word"):
            play(launched, killed)
        assert hunter.wait() == 0
    same_bytes(play(launched, killed), unbroken)


def hunt(run: Path, metrics: Path, rank: str) -> "subprocess.Popen[bytes]":
    """Another process that kills the worker of that rank once the first step is logged."""
    code = f"""
        import os, pathlib, signal, time
        metrics = pathlib.Path({str(metrics)!r})
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.001)
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_text().split(chr(0))
                around = (process / "environ").read_text().split(chr(0))
            except OSError:
                continue
            at_work = "prefloop.run.worker" in words and {str(run)!r} in words
            if at_work and "RANK={rank}" in around:
                os.kill(int(process.name), signal.SIGKILL)
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])


# A launcher of our own, without processes of Python: what is told of each kind of end.


@pytest.fixture
def launched(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a shell script in the launcher's place; $NOTES is where workers leave their notes."""
    stage = Stage(tmp_path, 0, "train", tmp_path / "train")

    def call(script: str, watch: Callable[[], None] = lambda: None) -> dict[str, Any]:
        path = tmp_path / "launcher.sh"
        path.write_text(f"NOTES={stage.notes}\n{textwrap.dedent(script)}")
        return run_processes(LaunchOptions(command=f"sh {path}"), stage, watch)

    return call


def test_the_first_processs_facts_come_back_and_nothing_is_left(launched, tmp_path):
    assert launched("""echo '{"steps": 3}' > $NOTES/facts.json""") == {"steps": 3}
    assert list((tmp_path / "train").iterdir()) == []


def test_an_error_of_the_users_is_passed_on_as_it_is(launched):
    with pytest.raises(LaunchError, match=r"^the loss of p3 is not finite$"):
        launched("""
            touch $NOTES/rank-0.log $NOTES/rank-1.log
            echo '{"ended": "error", "says": "RuntimeError: peer", "time": 1}' > $NOTES/rank-0.json
            echo '{"ended": "user error", "says": "the loss of p3 is not finite", "time": 2}' > $NOTES/rank-1.json
            exit 1""")


def test_who_died_without_a_word_is_named_with_its_last_lines(launched):
    with pytest.raises(
        LaunchError, match=r"process 1 of train died .*\(its last lines: a \| b\); the"
    ):
        launched("""
            touch $NOTES/rank-0.log
            printf 'a\\nb\\n' > $NOTES/rank-1.log
            echo '{"ended": "error", "says": "RuntimeError: peer", "time": 1}' > $NOTES/rank-0.json
            exit 1""")


def test_of_several_errors_the_first_is_told(launched):
    with pytest.raises(
        LaunchError, match=r"process 0 of train failed with IndexError: 7; the same"
    ):
        launched("""
            touch $NOTES/rank-0.log $NOTES/rank-1.log
            echo '{"ended": "error", "says": "RuntimeError: peer", "time": 2}' > $NOTES/rank-1.json
            echo '{"ended": "error", "says": "IndexError: 7", "time": 1}' > $NOTES/rank-0.json
            exit 1""")


def test_a_launcher_that_starts_nothing_is_quoted(launched, tmp_path):
    with pytest.raises(LaunchError, match=r"ended with code 3 \(its last lines: no such option\)"):
        launched("echo no such option >&2; exit 3")
    assert (tmp_path / "train" / "processes" / "launcher.log").exists()


def test_a_launcher_that_ends_well_without_facts_is_an_error(launched):
    with pytest.raises(LaunchError, match=r"ended with code 0"):
        launched("true")


def ends(process: int) -> bool:
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_the_processes_end_with_the_run(launched, tmp_path, end):
    started = tmp_path / "pid"

    def watch() -> None:
        if started.exists() and started.read_text():
            raise end

    with pytest.raises(end):
        launched(f"sleep 60 & echo $! > {started}; wait", watch)
    assert ends(int(started.read_text()))


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's death"
)
def test_the_processes_end_with_a_run_that_is_killed(tmp_path):
    started = tmp_path / "pid"
    code = f"""
        from pathlib import Path
        from prefloop.recipe.options import LaunchOptions
        from prefloop.run.launch import Stage, run_processes
        script = Path({str(tmp_path)!r}, "launcher.sh")
        script.write_text("echo $$ > {started}; exec sleep 60")
        options = LaunchOptions(command=f"sh {{script}}")
        run_processes(options, Stage(script.parent, 0, "train", script.parent / "train"), lambda: None)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    while not (started.exists() and started.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert ends(int(started.read_text()))


def test_processes_of_an_earlier_start_must_be_gone(launched, tmp_path, monkeypatch):
    monkeypatch.setattr("prefloop.run.launch._GRACE", 0.3)
    with (
        working_in(tmp_path),
        pytest.raises(RunFolderError, match="processes of an earlier start are still at work"),
    ):
        launched("true")


# The worker's own end.


def test_a_worker_that_is_told_to_end_leaves_a_note(tmp_path):
    code = f"""
        import time
        from pathlib import Path
        from prefloop.run.worker import _end_when_told
        _end_when_told(Path({str(tmp_path / "rank-0.json")!r}))
        Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(60)
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    while not (tmp_path / "ready").exists():
        assert worker.poll() is None
        time.sleep(0.02)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 143
    assert json.loads((tmp_path / "rank-0.json").read_text())["ended"] == "terminated"


# The recipe.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "launch needs either processes or command"),
        ({"processes": 2, "command": "torchrun"}, "launch needs either processes or command"),
        (
            {"command": "torchrun", "sharding": "fsdp2"},
            "launch.sharding goes with launch.processes",
        ),
        ({"processes": 0}, "launch.processes .*greater than or equal to 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, says):
    with pytest.raises(RecipeError, match=says):
        build(LaunchOptions, options, "launch")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("no-such-launcher --x", "launch.command: no program 'no-such-launcher'"),
        ("accelerate launch --config_file none.yaml", "launch.command: no file none.yaml"),
    ],
)
def test_check_finds_a_launcher_that_is_not_there(model_folder, command, says):
    with pytest.raises((RecipeError, LaunchError), match=says):
        check_recipe(recipe(model_folder, launch={"command": command}))


def test_all_processes_on_one_device_are_refused(model_folder):
    with pytest.raises(
        ValidationError, match=r"model\.device should be auto or cpu; it is 'cuda:1'"
    ):
        recipe(model_folder, model={"device": "cuda:1"}, launch={"processes": 2})


def test_check_says_where_processes_would_idle(model_folder):
    (note,) = check_recipe(recipe(model_folder, launch={"processes": 8}))[-1:]
    assert note == (
        "train.batch_size (4) is less than launch.processes (8): some processes have nothing to do"
    )
