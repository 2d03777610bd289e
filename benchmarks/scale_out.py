"""Two processes train as one, and survive the death of either: the same losses, then the same bytes.

One round's pairs (two different short answers to an embedded prompt) are trained on in this process, then in two
processes (each with the whole model, or sharded), and the loss of every step is compared; and once more with one
process killed in the middle, where the error must name it, and the same call must go on to the bytes of the unbroken one.
Without the stages around it: those are tested in tests/run/test_launch.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from kill_resume import tiny_model

from prefloop.data.prompts import DataOptions, read_prompts
from prefloop.errors import LaunchError
from prefloop.recipe import Recipe
from prefloop.recipe.options import LaunchOptions
from prefloop.records import Pair, write_jsonl
from prefloop.run.launch import Stage, run_processes
from prefloop.run.session import Session
from prefloop.run_folder import RunDir

ACCELERATE = "accelerate launch --num_processes 2 --config_file {}/{}.yaml"
CONFIGS = Path(__file__).parents[1] / "prefloop" / "recipes" / "accelerate"
LAUNCHES: dict[str, LaunchOptions] = {
    "replicated": LaunchOptions(processes=2),
    "fsdp2": LaunchOptions(processes=2, sharding="fsdp2"),
    **{
        name: LaunchOptions(command=ACCELERATE.format(CONFIGS, name))
        for name in ("cpu-ddp", "cpu-fsdp2", "zero3")
    },
}


def recipe(options: argparse.Namespace, model: str) -> Recipe:
    """AROP for two epochs with a checkpoint after every step."""
    train = {"epochs": 2, "batch_size": 4, "micro_batch_size": 1, "save_every": 1}
    return Recipe.model_validate(
        {
            "name": "scale",
            "model": {
                "source": model,
                "device": "cpu",
                "dtype": "float32",
                "tuning": options.tuning,
            },
            "method": {"name": "arop"},
            "train": train | {"lr": 1e-4 if options.tuning == "lora" else 1e-5},
        }
    )


def run_folder(folder: Path, recipe: Recipe, count: int) -> Stage:
    """A run that has come to its first training."""
    data = DataOptions()
    prompts = list(islice(read_prompts(data.train, data, needs_target=True), count + 1))
    pairs = [
        Pair(
            prompt_id=one.id,
            round=0,
            prompt=one.messages,
            chosen=str(one.target),
            rejected=str(other.target),
            margin=1.0,
        )
        for one, other in pairwise(prompts)
    ]
    round_dir = RunDir(folder).round(0)
    write_jsonl(round_dir.path / "pairs.jsonl", pairs)
    (folder / "recipe.yaml").write_text(recipe.dump())
    return Stage(folder, 0, "train", round_dir.train)


def losses(stage: Stage) -> list[float]:
    lines = (stage.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def results(stage: Stage) -> list[bytes]:
    """Metrics and weights."""
    weights = sorted((stage.run / "rounds/0000/policy").glob("*.safetensors"))
    assert weights
    return [path.read_bytes() for path in (stage.folder / "metrics.jsonl", *weights)]


def killer(stage: Stage, rank: int, step: int) -> Callable[[], None]:
    """Kills the process of that rank once so many steps are logged."""

    def watch() -> None:
        metrics = stage.folder / "metrics.jsonl"
        if not metrics.exists() or len(metrics.read_text().splitlines()) < step:
            return
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_text().split("\0")
                around = (process / "environ").read_text().split("\0")
            except OSError:
                continue
            if {"prefloop.run.worker", str(stage.run)} <= set(words) and f"RANK={rank}" in around:
                os.kill(int(process.name), signal.SIGKILL)

    return watch


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 1)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs; the numbers that the script prints."""
    model = {"tiny": str(folder / "model"), "embedded": "embedded:smollm2-135m"}.get(
        options.model, options.model
    )
    if options.model == "tiny":
        tiny_model(folder / "model")
    values = recipe(options, model)
    one = run_folder(folder / "one", values, options.pairs)
    session = Session(values, RunDir(one.run))
    seconds = timed(lambda: session.train(RunDir(one.run).round(0)))
    session.release()
    found: dict[str, Any] = {"one": {"seconds": seconds, "steps": len(losses(one))}}
    draw = random.Random(options.seed)
    for name in options.placements:
        launch = LAUNCHES[name]
        two = run_folder(folder / name, values, options.pairs)
        facts: dict[str, Any] = {"seconds": timed(lambda: run_processes(launch, two, lambda: None))}  # noqa: B023
        curves = zip(losses(one), losses(two), strict=True)
        facts["largest_difference_of_loss"] = max(abs(a - b) for a, b in curves)
        if options.kill:
            broken = run_folder(folder / f"{name}-killed", values, options.pairs)
            rank, step = draw.randrange(2), draw.randint(1, len(losses(one)) - 2)
            facts |= {"killed_rank": rank, "after_step": step, "says": "nothing"}
            try:
                run_processes(launch, broken, killer(broken, rank, step))
            except LaunchError as error:
                facts["says"] = str(error)
            run_processes(launch, broken, lambda: None)
            facts["identical_after_resume"] = results(two) == results(broken)
        found[name] = facts
        print(name, facts, file=sys.stderr, flush=True)
    return {"model": options.model, "tuning": options.tuning, "pairs": options.pairs, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, embedded, or a model's folder")
    parser.add_argument("--tuning", default="lora", choices=["lora", "full"])
    parser.add_argument("--pairs", type=int, default=16, help="pairs of the round")
    parser.add_argument(
        "--placements", nargs="+", default=["replicated", "fsdp2"], choices=LAUNCHES
    )
    parser.add_argument("--kill", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0, help="of who is killed when")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    print(json.dumps(found, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
