"""Claim: prompts stream through a round; ten times as many take hardly more memory, and ten times the time.

Plays one round of AROP or SFT with the fake engine, for each number of prompts in a process of its own: data, generating,
ranking and pairing; unless `--train-steps` is 0 also encoding, the reference pass over all pairs on a tiny model, so many
optimiser steps, measuring and publishing. Then the report, the pairs as a data set, and the same command again, which finds
all of it done. For each stage its CPU and clock seconds, the largest memory during it, and the bytes that it left; then the
largest files. Stages are told on standard error as they end, as a million prompts take most of an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from prefloop.manifest import _hash_large

_WORDS = "a river carries what the mountain gives it and the town takes what it needs from it "
_GATES = {"cut_off": False, "max_edit_share": None, "max_length_ratio": None}
_METHODS = {
    "arop": {"name": "arop", "margin": {"kind": "fixed"}, "gates": _GATES},
    "sft": {"name": "sft"},
}


def prompts(path: Path, count: int, repeats: int) -> None:
    """Prompts of about `repeats` x 80 characters, with targets as long."""
    with path.open("w") as file:
        for number in range(count):
            row = {
                "prompt": f"Question {number}: {_WORDS * repeats}?",
                "response": _WORDS * repeats,
            }
            file.write(json.dumps(row) + "\n")


class Stages:
    """What each stage took: seconds, peak MiB, and megabytes left in the run's folder.

    Of stages in chunks also the median milliseconds (CPU) of a chunk in the first and in the last tenth: on a busy machine
    these tell growth better than sums do.
    """

    def __init__(self, folder: Path) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._folder = folder
        self._bytes = 0
        self._chunk_ends: list[float] = []

    def chunk_ended(self) -> None:
        """Called after each chunk of a stage."""
        self._chunk_ends.append(time.process_time())

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        # Files are hashed as by a process of its own, which has seen none of them.
        _hash_large.cache_clear()
        # Forgets the peak so far (Linux), so that each stage has one of its own.
        Path("/proc/self/clear_refs").write_text("5")
        self._chunk_ends.clear()
        wall, thread = time.perf_counter(), time.process_time()
        yield
        size = sum(p.stat().st_size for p in self._folder.rglob("*") if p.is_file())
        self.found[name] = {
            "seconds": round(time.perf_counter() - wall, 1),
            "cpu_seconds": round(time.process_time() - thread, 2),
            "peak_mib": _status("VmHWM"),
            "mb": round((size - self._bytes) / 1e6, 1),
        }
        if tenth := len(self._chunk_ends) // 10:
            took = [1000 * (end - start) for start, end in pairwise(self._chunk_ends)]
            self.found[name] |= {
                "first_chunks_ms": round(median(took[:tenth]), 2),
                "last_chunks_ms": round(median(took[-tenth:]), 2),
            }
        self._bytes = size
        print(f"{name}: {self.found[name]}", file=sys.stderr, flush=True)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024, 1)


def round_of(count: int, job: dict[str, Any]) -> dict[str, Any]:
    """One round of `count` prompts, stage by stage."""
    from prefloop.recipe import Recipe

    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        data, out = Path(folder) / "prompts.jsonl", Path(folder) / "run"
        prompts(data, count + 2 * job["holdout"], job["repeats"])
        recipe = Recipe.model_validate(
            {
                "name": "memory",
                "model": {"source": job["model"], "device": "cpu"},
                "data": {
                    "train": str(data),
                    "holdout": job["holdout"],
                    "max_prompt_tokens": 4096,
                    "max_response_tokens": 4096,
                },
                "method": _METHODS[job["method"]],
                "engine": {"name": "fake"},
                "loop": {"rounds": 1, "prompts_per_round": count},
                "generate": {"chunk_size": 256},
                "train": {"batch_size": 32, "micro_batch_size": 32, "token_budget": 8192},
                "guard": {"min_distinct2": 0.0},
            }
        )
        stages = Stages(out)
        pairs = _play(recipe, out, stages, job["train_steps"])
        _read(recipe, out, stages, job["train_steps"])
        found = stages.found
        making = [found[name] for name in ("candidates", "ranked", "pairs")]
        return {
            "prompts": count,
            "pairs": pairs,
            "prompts_mb": round(data.stat().st_size / 1e6, 1),
            "start_mib": found["model"]["peak_mib"],
            "peak_mib": max(stage["peak_mib"] for stage in found.values()),
            "seconds": round(sum(stage["seconds"] for stage in making), 1),
            "cpu_seconds": round(sum(stage["cpu_seconds"] for stage in found.values()), 1),
            "folder_mb": round(sum(stage["mb"] for stage in found.values()), 1),
            "stages": found,
            "files_mb": largest_files(out),
        }


def largest_files(folder: Path) -> dict[str, float]:
    """Megabytes of each file of half a megabyte and more, by its path."""
    sizes = {path: path.stat().st_size / 1e6 for path in folder.rglob("*") if path.is_file()}
    return {
        path.relative_to(folder).as_posix(): round(size, 1)
        for path, size in sorted(sizes.items(), key=lambda item: -item[1])
        if size >= 0.5
    }


def _play(recipe: Any, out: Path, stages: Stages, train_steps: int) -> int:
    """The round; the number of its pairs."""
    from rich.console import Console

    from prefloop.run.chunks import Journal
    from prefloop.run.loop import _Loop
    from prefloop.run_folder import open_run
    from prefloop.train import trainer

    whole, append = trainer.schedule, Journal.append

    def append_and_tell(journal: Journal, *args: Any) -> None:
        append(journal, *args)
        stages.chunk_ended()

    def few_steps(count: int, **options: int) -> list[list[int]]:
        return whole(count, **options)[:train_steps]

    with (
        open_run(out, recipe.dump()) as rundir,
        mock.patch.object(Journal, "append", append_and_tell),
    ):
        loop = _Loop(recipe, rundir, Console(file=StringIO()))
        with stages.measured("model"):
            loop.session.policy_at(None)
        with stages.measured("data"):
            assert loop.session.data
        first = rundir.round(0)
        parts: dict[str, Callable[[Any], object]] = {
            "candidates": loop._generate, "ranked": loop._rank, "pairs": loop._pair
        }  # fmt: skip
        if train_steps:
            with stages.measured("start"):
                results = [loop._evaluate(rundir.round(-1))]
            parts |= {"train": loop._train, "evaluate": lambda r: results.append(loop._evaluate(r))}
        for name, stage in parts.items():
            with stages.measured(name), mock.patch.object(trainer, "schedule", few_steps):
                stage(first)
        if train_steps:
            with stages.measured("publish"):
                loop.finish(results)
        return first.count("pairs")


def _read(recipe: Any, out: Path, stages: Stages, train_steps: int) -> None:
    """What is done with a run that is there."""
    from rich.console import Console

    from prefloop.data.export import export_pairs
    from prefloop.report.html import write_report
    from prefloop.report.summary import show_outcome, show_run
    from prefloop.run.loop import run
    from prefloop.run.verify import verify_run
    from prefloop.run_folder import read_run

    quiet = Console(file=StringIO())
    if train_steps:
        with stages.measured("again"):
            outcome = run(recipe, out, quiet)
            show_outcome(outcome, quiet)
    with stages.measured("report"):
        write_report([out], out / "report.html")
    with stages.measured("show"):
        show_run(out, quiet, pair=None, count=3)
    if "rejected" in recipe.method.roles:
        with stages.measured("export"):
            pairs = (pair for _, made in read_run(out).pairs() for pair in made)
            export_pairs(pairs, out / "pairs.jsonl")
    with stages.measured("verify"):
        verify_run(out)


def _count(text: str) -> int:
    """A number of prompts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of prompts, such as 10000")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=_count, nargs="+", default=[2_000, 10_000])
    parser.add_argument("--method", choices=_METHODS, default="arop")
    parser.add_argument("--holdout", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="80 characters each, of a prompt")
    parser.add_argument(
        "--train-steps", type=int, default=10, help="optimiser steps; 0: end with the pairs"
    )
    parser.add_argument("--model", default="tiny", help="tiny, or a model's folder")
    parser.add_argument("--folder", type=Path, help="where the runs lie while they are measured")
    parser.add_argument("--allowed", type=float, default=64.0, help="MiB more for the last number")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = options.model
        if model == "tiny":
            sys.path.insert(0, str(Path(__file__).parent))
            from kill_resume import tiny_model

            model = f"{folder}/model"
            tiny_model(Path(model))
        job = {**vars(options), "model": model, "folder": folder}
        found = measure(options.prompts, job)
    print(json.dumps(found) if options.json else table(found))
    sys.exit(0 if found["grew_mib"] <= options.allowed else 1)


def measure(counts: list[int], job: dict[str, Any]) -> dict[str, Any]:
    """Each number in a process of its own."""
    sizes = []
    for count in counts:
        code = f"import json; from prompt_memory import *; print(json.dumps(round_of({count}, {job!r})))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            check=False,
            text=True,
            cwd=Path(__file__).parent,
        )
        if done.returncode:
            raise SystemExit(f"{count} prompts ended with code {done.returncode}")
        sizes.append(json.loads(done.stdout.splitlines()[-1]))
    return {"sizes": sizes, "grew_mib": round(sizes[-1]["peak_mib"] - sizes[0]["peak_mib"], 1)}


def table(found: dict[str, Any]) -> str:
    """A line a stage and number of prompts, then one a file."""
    names = ("seconds", "cpu s", "per 1,000", "peak MiB", "MB")
    lines = [f"{'prompts':>9} {'stage':12} " + " ".join(f"{name:>9}" for name in names)]
    for size in found["sizes"]:
        for name, of in size["stages"].items():
            each = 1000 * of["cpu_seconds"] / size["prompts"]
            numbers = (of["seconds"], of["cpu_seconds"], each, of["peak_mib"], of["mb"])
            lines.append(
                f"{size['prompts']:9,} {name:12} "
                + " ".join(f"{n:9,.2f}" for n in numbers)
                + _growth(of)
            )
        lines += [f"{size['prompts']:9,} all: {size['cpu_seconds']} CPU s, {size['folder_mb']} MB"]
        lines += [
            f"{size['prompts']:9,} {mb:9,.1f} MB {path}" for path, mb in size["files_mb"].items()
        ]
    return "\n".join([*lines, f"the last number's peak is {found['grew_mib']} MiB higher"])


def _growth(stage: dict[str, float]) -> str:
    if "last_chunks_ms" not in stage:
        return ""
    return f"  chunks {stage['first_chunks_ms']} to {stage['last_chunks_ms']} ms"


if __name__ == "__main__":
    main()
