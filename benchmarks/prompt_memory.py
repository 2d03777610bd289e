"""Claim: prompts stream through a round; ten times as many take hardly more memory.

Generates, ranks and pairs one round of AROP with the fake engine, for each number of prompts in a process
of its own, and reports its peak memory. Training is not part of it: it holds the pairs that it trains on.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path
from typing import Any


def prompts(path: Path, count: int) -> None:
    """Prompts of about 400 characters, with targets as long."""
    words = "a river carries what the mountain gives it and the town takes what it needs from it "
    with path.open("w") as file:
        for number in range(count):
            row = {"prompt": f"Question {number}: {words * 5}?", "response": words * 5}
            file.write(json.dumps(row) + "\n")


def round_of(count: int, model: str, holdout: int) -> dict[str, Any]:
    """Peak memory before and after the first three stages of a round of `count` prompts."""
    from rich.console import Console

    from prefloop.recipe import Recipe
    from prefloop.run.loop import _Loop
    from prefloop.run_folder import open_run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        prompts(path, count + 2 * holdout)
        gates = {"cut_off": False, "max_edit_share": None, "max_length_ratio": None}
        recipe = Recipe.model_validate(
            {
                "name": "memory",
                "model": {"source": model, "device": "cpu"},
                "data": {"train": str(path), "holdout": holdout, "max_prompt_tokens": 4096},
                "method": {"name": "arop", "margin": {"kind": "fixed"}, "gates": gates},
                "engine": {"name": "fake"},
                "loop": {"rounds": 1, "prompts_per_round": count},
                "generate": {"chunk_size": 256},
            }
        )
        with open_run(Path(folder) / "run", recipe.dump()) as rundir:
            loop = _Loop(recipe, rundir, Console(file=StringIO()))
            loop.session.policy_at(None)
            before, since = peak(), time.perf_counter()
            round_dir = rundir.round(0)
            loop._generate(round_dir)
            loop._rank(round_dir)
            loop._pair(round_dir)
            return {
                "prompts": count,
                "pairs": round_dir.count("pairs"),
                "start_mib": before,
                "peak_mib": peak(),
                "seconds": round(time.perf_counter() - since, 1),
            }


def peak() -> float:
    """The process's largest memory so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--holdout", type=int, default=64)
    parser.add_argument("--model", default="tiny", help="tiny, or a model's folder")
    parser.add_argument("--allowed", type=float, default=64.0, help="MiB more for the last number")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.model == "tiny":
        sys.path.insert(0, str(Path(__file__).parent))
        from kill_resume import tiny_model

        with tempfile.TemporaryDirectory() as folder:
            tiny_model(Path(folder))
            found = measure(options, folder)
    else:
        found = measure(options, options.model)
    print(json.dumps(found) if options.json else "\n".join(map(str, found["sizes"])))
    sys.exit(0 if found["grew_mib"] <= options.allowed else 1)


def measure(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Each number in a process of its own, because a peak never falls."""
    sizes = []
    for count in options.prompts:
        code = f"import json; from prompt_memory import *; print(json.dumps(round_of({count}, {model!r}, {options.holdout})))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=False,
            text=True,
            cwd=Path(__file__).parent,
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        sizes.append(json.loads(done.stdout))
    return {"sizes": sizes, "grew_mib": round(sizes[-1]["peak_mib"] - sizes[0]["peak_mib"], 1)}


if __name__ == "__main__":
    main()
