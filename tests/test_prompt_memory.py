"""The benchmark of a loop's size, small: every stage is told, of both methods."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "prompt_memory.py"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["arop", "sft"])
def test_every_stage_has_its_seconds_memory_and_bytes(method: str) -> None:
    words = ["--method", method, "--prompts", "40", "--holdout", "4", "--train-steps", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--json"], capture_output=True, text=True, check=True
    )
    (size,) = json.loads(done.stdout)["sizes"]
    assert size["pairs"] == 40
    stages = size["stages"]
    assert {"data", "candidates", "ranked", "pairs", "train", "report", "verify"} <= stages.keys()
    assert all(stage["peak_mib"] > 0 and stage["cpu_seconds"] >= 0 for stage in stages.values())
    assert size["folder_mb"] > 0
    assert all(f"{name}: {stage}" in done.stderr for name, stage in stages.items())
