"""The command as people run it: processes for cells, killed in the middle, and going on."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.compare.test_compare_reuse import base, what_counts


def command(folder: Path, out: str) -> list[str]:
    words = ["compare", str(folder / "mine.yaml"), "--out", str(folder / out), "--jobs", "2"]
    return [sys.executable, "-m", "prefloop", *words]


def living(folder: Path) -> list[str]:
    """Commands of processes that work in the folder; Linux only."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended in between
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if f"--out {folder}" in line]


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="looks for processes in /proc, which only Linux has"
)
def test_killed_in_the_middle_it_leaves_nobody_behind_and_the_same_command_ends_it(
    model_folder, tmp_path
):
    values = {
        "base": {**base(model_folder), "sft": None},
        "seeds": [0, 1],
        "variants": {"ial": {}, "eta-1": {"method.eta": 1.0}},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    first = subprocess.Popen(command(tmp_path, "out"), env=environment)
    deadline = time.monotonic() + 600
    try:
        while not list((tmp_path / "out").glob("*/*/rounds/0000/candidates.jsonl")):
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.1)
    finally:
        first.kill()
        first.wait()
    deadline = time.monotonic() + 60
    while living(tmp_path / "out"):
        assert time.monotonic() < deadline, "a cell outlives the comparison"
        time.sleep(0.1)
    for out in ("out", "whole"):
        ended = subprocess.run(
            command(tmp_path, out), env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert "Ranking by score" in ended.stdout
    assert "eta-1 seed 0: begins, answers, introspection, candidates, ranked done before" in (
        ended.stderr
    )
    for cell in ("ial/seed-0", "ial/seed-1", "eta-1/seed-0", "eta-1/seed-1"):
        assert what_counts(tmp_path / "out" / cell) == what_counts(tmp_path / "whole" / cell)
