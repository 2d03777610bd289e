"""The script for a GPU, in its small form: every part comes to its end, within the limits that it states."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.py"


@pytest.mark.slow
def test_every_part_of_the_small_form_is_within_its_limits() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found.keys() == {"form", "device", "parts", "missed", "failures"}
    assert (found["form"], found["failures"], found["missed"]) == ("small", {}, []), done.stderr
    parts = found["parts"]
    assert parts.keys() == {"machine", "exact", "first loss", "step", "generate", "ddp", "flex"}
    exact = parts["exact"]["figures"]
    assert exact["float32"]["logp_max"] < 1e-4
    assert exact["float32"]["gradient"] < 1e-4
    assert exact["float32, branches seeing each other"]["gradient"] > 0.01
    assert parts["step"]["figures"]["distinct of them"] < parts["step"]["figures"]["tokens a batch"]
    assert parts["generate"]["figures"]["slots"] == "used"


@pytest.mark.slow
def test_what_time_does_not_allow_is_listed_and_not_hidden() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small", "--json", "--seconds", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout)["failures"]
