"""PPO in the closed loop: two rounds leave what the next one needs, and go on where they were stopped."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from prefloop.recipe import Recipe
from prefloop.run.loop import run
from prefloop.train.ppo_trainer import CRITIC
from prefloop.train.trainer import Trainer


def recipe(folder: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "ppo",
            "model": {"source": str(folder), "device": "cpu", "dtype": "float32"},
            "method": {"name": "ppo", "sampling": {"max_new_tokens": 8}},
            "judge": {"name": "similarity"},
            "generate": {"chunk_size": 4},
            "loop": {"rounds": 2, "prompts_per_round": 4},
            "train": {"epochs": 1, "lr": 1e-2, "batch_size": 2, "micro_batch_size": 2},
            "evaluate": {"prompts": 1, "every_round": False},
            "guard": {"min_stop_rate": 0.0},
        }
    )


def play(folder: Path, model_folder: Path) -> dict[str, bytes]:
    """The run, and all of it that must not depend on interruptions."""
    run(recipe(model_folder), folder, Console(file=StringIO()))
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".jsonl", ".safetensors") and path.name != "events.jsonl"
    }


def test_two_rounds_stopped_in_training_end_in_the_same_bytes(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once in each round: the value head and what was seen come back from the round before."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    expected = play(tmp_path / "unbroken", model_folder)
    original, count = Trainer._step, iter(range(100))

    def guarded(self: Trainer, *args: Any) -> Any:
        if next(count) in (1, 5):
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Trainer, "_step", guarded)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "stopped", model_folder)
    assert play(tmp_path / "stopped", model_folder) == expected
    rounds = [tmp_path / "unbroken/rounds" / name / "train" for name in ("0000", "0001")]
    counts = [load_file(folder / CRITIC)["count"].item() for folder in rounds]
    steps = [json.loads(line) for line in (rounds[1] / "metrics.jsonl").read_text().splitlines()]
    assert counts[0] > 0
    assert counts[1] > counts[0]
    assert steps[0]["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert steps[0]["kl_reference"] != 0
    result = json.loads(Path(tmp_path / "unbroken/rounds/0001/result.jsonl").read_text())
    assert {"train_reward", "train_explained_variance"} <= result["measures"].keys()
