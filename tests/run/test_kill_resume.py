"""The benchmark behind the claim of exact resume: that it can fail, and that it does not."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_resume", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The module's records are looked up there by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_every_difference_is_found(script, tmp_path):
    for run in ("a", "b"):
        touch(tmp_path / run, "rounds/0000/pairs.jsonl", "policy/model.safetensors", "recipe.yaml")
        (tmp_path / run / "events.jsonl").write_text(run)
    assert script.different(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "a" / "rounds/0000/pairs.jsonl").write_text("x")
    (tmp_path / "b" / "policy/model.safetensors").write_text("x")
    touch(tmp_path / "b", "rounds/0000/train/.checkpoint-000001/weights.safetensors")
    assert script.different(tmp_path / "a", tmp_path / "b") == [
        "policy/model.safetensors",
        "rounds/0000/pairs.jsonl",
        "rounds/0000/train/.checkpoint-000001/weights.safetensors",
    ]


def test_the_stage_in_progress_is_seen_in_the_folder(script, tmp_path):
    run = script.Run("recipe", (), tmp_path)
    round_dir = tmp_path / "rounds" / "0000"
    assert run.place(set()) is None
    touch(tmp_path, "rounds/start/answers.progress.json")
    assert run.place(set()) == (-1, "answers")
    touch(tmp_path, "rounds/start/answers.done.json", "rounds/0000/candidates.progress.json")
    assert run.place(set()) == (0, "candidates")
    touch(round_dir, "candidates.done.json", "ranked.done.json", "pairs.done.json")
    assert run.place(set()) == (0, "train")
    touch(round_dir, ".policy.abc/adapter_model.safetensors")
    assert run.place(set()) == (0, "policy")
    assert run.place(run.half_saved()) == (0, "train")
    touch(round_dir, "train.done.json")
    assert run.place(set()) is None


@pytest.mark.parametrize("kills", [3, 14, 40])
def test_all_stages_are_planned_once_before_any_twice(script, kills):
    plan = script.plan(["ial", "arop"], kills, 2, random.Random(0))
    assert sum(map(len, plan.values())) == kills
    assert abs(len(plan["ial"]) - len(plan["arop"])) <= 1
    stages = [place.stage for found in plan.values() for place in found]
    counts = [stages.count(stage) for stage in script.STAGES]
    assert max(counts) - min(counts) <= 1
    for found in plan.values():
        assert found == sorted(found, key=lambda place: place.time)


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes():
    command = [sys.executable, str(SCRIPT), "--kills", "7", "--json"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["identical"]
    assert 1 <= found["kills"] <= 7
    assert sum(found["stages"].values()) == found["kills"]
    assert found["runs"].keys() == {"ial", "arop"}
