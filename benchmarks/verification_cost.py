"""Claim: comparing what was written with its hashes costs less than 2 % of a run.

Plays a run under cProfile, then the same command once more and `prefloop verify`; sums the time inside
prefloop/manifest.py (hashes, seals, synced writes of manifests) and prefloop/run/inputs.py (identity of model and
data), once, for the outermost function. `verifying` is all of it but `writing`, most of which is waiting for the disk.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

from damage import prefloop, recipe
from kill_resume import tiny_model

WRITING = ("manifests: write", "manifests: write_atomically", "manifests: sealed")
PARTS = {"manifests": "prefloop/manifest.py", "inputs": "prefloop/run/inputs.py"}


def part_of(file: str) -> str | None:
    """The part that a function's file belongs to."""
    return next((part for part, ending in PARTS.items() if file.endswith(ending)), None)


def seconds_inside(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds from entering a part from outside to leaving it, by "part: function"."""
    seconds: dict[str, float] = {}
    stats: Any = pstats.Stats(profile)
    for (file, _, name), (_, _, _, _, callers) in stats.stats.items():
        part = part_of(file)
        for (caller, _, _), (_, _, _, cumulative) in callers.items():
            if part is not None and part_of(caller) is None:
                key = f"{part}: {name}"
                seconds[key] = seconds.get(key, 0.0) + cumulative
    return seconds


def played(words: list[str]) -> dict[str, Any]:
    """A command under the profiler: its seconds, and those inside the parts."""
    profile, begin = cProfile.Profile(), time.perf_counter()
    profile.enable()
    code, _, err = prefloop(words)
    profile.disable()
    if code:
        raise SystemExit(f"{' '.join(words)} ended with {code}: {err}")
    total, inside = time.perf_counter() - begin, seconds_inside(profile)
    writing = sum(inside.get(name, 0.0) for name in WRITING)
    verifying = sum(inside.values()) - writing
    return {
        "seconds": round(total, 3),
        "verifying": {"seconds": round(verifying, 4), "share": round(verifying / total, 5)},
        "writing": {"seconds": round(writing, 4), "share": round(writing / total, 5)},
        "by": {name: round(took, 4) for name, took in sorted(inside.items()) if took > 5e-5},
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run, the same command on the finished run, and the look at all of it."""
    asked = options.recipe
    if asked is None:
        rows = folder / "rows.jsonl"
        rows.write_text(
            "".join(
                json.dumps({"prompt": f"question {n}?", "response": f"answer {n}"}) + "\n"
                for n in range(12)
            )
        )
        tiny_model(folder / "model")
        (folder / "tiny.yaml").write_text(
            json.dumps(recipe("ial", folder / "model", rows, folder / "none"))
        )
        asked = str(folder / "tiny.yaml")
    overrides = [word for value in options.set or () for word in ("--set", value)]
    run = ["run", asked, *overrides, "--out", str(folder / "run"), "--json"]
    return {"run": played(run), "again": played(run), "verify": played(["verify", run[-2]])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", help="a recipe of yours instead of a tiny one")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="as for prefloop run")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder).resolve()), indent=1))


if __name__ == "__main__":
    main()
