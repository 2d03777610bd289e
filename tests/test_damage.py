"""The harness of damages, small: nothing is used unnoticed, nothing ends in a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_damage_is_used_unnoticed() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "damage.py"
    words = ["--count", "60", "--only", "ial", "evaluate", "annotate", "--json"]
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, check=False
    )
    found = json.loads(done.stdout)
    assert (found["silent"], found["traceback"]) == (0, 0), found["wrong"]
    assert found["noticed"] > 10
