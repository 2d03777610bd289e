"""Claim: `leaderboard` gives what lm-evaluation-harness's own command line gives, item by item, in less time.

For each of the six benchmarks the harness's command line (its hf backend, float32) and prefloop answer the same
questions of the same local files. Reported: on how many questions the values differ, the largest difference of a
log-probability, and the time that the model's answers took, by the wall clock and of the processor (which other work on
the machine disturbs less). That leaves out what both do alike in the harness: imports, reading its tasks, prompts. Each
side runs in a process of its own, one after the other. MMLU's questions are of two subjects, as many in each as a
subset of the whole would have, since the examples that a subject's questions share are what our side saves there.

    python benchmarks/leaderboard.py --folder DATA --json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefloop.evaluate.measures.leaderboard import (
    TASKS,
    DrawnQuestions,
    Leaderboard,
    harness_folders,
    load_tasks,
)

# So many that the harness needs about a minute for each on one core of 2020.
_ITEMS = {
    "arc_challenge": 4,
    "hellaswag": 6,
    "mmlu": 16,
    "truthfulqa_mc2": 10,
    "winogrande": 24,
    "gsm8k": 5,
}
_SUBJECTS = ("mmlu_college_chemistry", "mmlu_high_school_geography")
_FILTERS = {"gsm8k": "strict-match"}
_METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "gsm8k": "exact_match"}


class Clock:
    """Adds up the seconds that calls take, by the wall clock and of the processor."""

    def __init__(self) -> None:
        self.wall, self.processor = 0.0, 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            wall, processor = time.perf_counter(), time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.wall += time.perf_counter() - wall
                self.processor += time.process_time() - processor

        return timed


def _tasks(job: Mapping[str, Any], folder: Path) -> Path:
    """Our tasks for the harness; of MMLU only the subjects that are asked, since it would ask all others whole."""
    shutil.copytree(TASKS, folder)
    if job["benchmark"] == "mmlu":
        text = "group: prefloop_mmlu\ntask:\n"
        for name in job["drawn"]:
            text += f"  - task: {name}\n    num_fewshot: 5\n    custom_dataset: !function local_data.mmlu\n"
        (folder / "mmlu.yaml").write_text(text)
    return folder


def by_command_line(job: Mapping[str, Any]) -> dict[str, Any]:
    """`lm_eval run ...` in this process, with a clock on its model; of its own tasks it reads the six alone."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.manager import TaskManager

    own = _tasks(job, Path(job["out"] + "_tasks"))
    index = TaskManager.__init__

    def six(self: TaskManager, *rest: Any, include_path: Any = None, **options: Any) -> None:
        options["include_defaults"] = False
        index(self, *rest, include_path=[*harness_folders(), own], **options)

    TaskManager.__init__ = six
    clock = Clock()
    HFLM.loglikelihood = clock.around(HFLM.loglikelihood)
    HFLM.generate_until = clock.around(HFLM.generate_until)
    out = Path(job["out"])
    sys.argv = [
        "lm_eval", "run", "--model", "hf", "--device", "cpu",
        "--model_args", f"pretrained={job['model']},dtype=float32",
        "--batch_size", str(job["batch"]), "--tasks", f"prefloop_{job['benchmark']}",
        "--include_path", str(own), "--metadata", json.dumps({"folder": job["folder"]}),
        "--samples", json.dumps(job["drawn"]), "--log_samples", "--output_path", str(out),
    ]  # fmt: skip
    cli_evaluate()
    values, logprobs = {}, {}
    for file in out.rglob("samples_*.jsonl"):
        task = file.name.removeprefix("samples_").rpartition("_")[0]
        if task not in job["drawn"]:
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["filter"] == _FILTERS.get(job["benchmark"], "none"):
                key = f"{task}/{row['doc_id']}"
                values[key] = float(row[_METRICS.get(job["benchmark"], "acc")])
                logprobs[key] = row["resps"]
    return {"values": values, "answers": logprobs, "wall": clock.wall, "processor": clock.processor}


def by_prefloop(job: Mapping[str, Any]) -> dict[str, Any]:
    """The measure, with a clock on what lm-eval asks of the model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prefloop.evaluate import lm_eval_model as harness
    from prefloop.evaluate.measures import Subject, leaderboard
    from prefloop.generate.hf_engine import HFEngine
    from prefloop.machine import keep_freed_memory

    keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    clock, kept = Clock(), {}
    lm = harness.PolicyLM
    lm.loglikelihood = clock.around(lm.loglikelihood)  # type: ignore[method-assign]
    lm.generate_until = clock.around(lm.generate_until)  # type: ignore[method-assign]
    items_of = leaderboard._items

    def keeping(samples: Mapping[str, Any]) -> Any:
        for task, rows in samples.items():
            for row in rows:
                if row["filter"] == _FILTERS.get(job["benchmark"], "none"):
                    kept[f"{task}/{row['doc_id']}"] = row["resps"]
        return items_of(samples)

    leaderboard._items = keeping  # type: ignore[assignment]
    folder = Path(job["out"])
    folder.mkdir()
    subject = Subject("", HFEngine(model, tokenizer), None, model, tokenizer, None, folder, 0)
    options = Leaderboard(folder=Path(job["folder"]), tasks=(job["benchmark"],))
    Leaderboard.drawn = lambda *_: job["drawn"]  # type: ignore[method-assign]
    outcome = options.run(subject)
    return {
        "values": {item.id: item.values[job["benchmark"]] for item in outcome.items},
        "answers": kept,
        "wall": clock.wall,
        "processor": clock.processor,
    }


WORKERS = {"lm_eval": by_command_line, "prefloop": by_prefloop}


def in_a_process(side: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's result, with the peak memory of its process."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "job.json", Path(folder) / "found.json"
        given.write_text(json.dumps({**job, "out": str(Path(folder) / "out")}))
        command = [sys.executable, __file__, "--worker", side, str(given), str(found)]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(
            command, env={**os.environ, **offline}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
        return dict(json.loads(found.read_text()))


def worker(side: str, given: str, found: str) -> None:
    """One side's work, in a process of its own."""
    result = WORKERS[side](json.loads(Path(given).read_text()))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    Path(found).write_text(json.dumps({**result, "peak_gb": memory}))


def _numbers(answers: Any) -> list[float]:
    """Log-probabilities among a question's answers; generated texts have none."""
    if isinstance(answers, list) and len(answers) == 2 and isinstance(answers[1], bool | str):
        return [float(answers[0])]
    return [n for part in answers for n in _numbers(part)] if isinstance(answers, list) else []


def compared(benchmark: str, sides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One benchmark's figures."""
    theirs, ours = sides["lm_eval"], sides["prefloop"]
    assert theirs["values"].keys() == ours["values"].keys(), "other questions were asked"
    items = list(theirs["values"])
    graded = benchmark == "truthfulqa_mc2"
    apart = [abs(theirs["values"][key] - ours["values"][key]) for key in items]
    logps = [
        abs(a - b)
        for key in items
        for a, b in zip(
            _numbers(theirs["answers"][key]), _numbers(ours["answers"][key]), strict=True
        )
    ]
    texts = sum(theirs["answers"][key] != ours["answers"][key] for key in items)
    return {
        "items": len(items),
        "differing_items": sum(value > (1e-4 if graded else 0) for value in apart),
        "differing_texts": texts if benchmark == "gsm8k" else None,
        "largest_difference_of_a_value": max(apart),
        "largest_difference_of_a_logprob": max(logps, default=None),
        "value": sum(ours["values"].values()) / len(items),
        "wall_seconds": {side: round(found["wall"], 2) for side, found in sides.items()},
        "processor_seconds": {side: round(found["processor"], 2) for side, found in sides.items()},
        "lm_eval_over_prefloop": round(theirs["wall"] / ours["wall"], 2),
        "lm_eval_over_prefloop_processor": round(theirs["processor"] / ours["processor"], 2),
        "peak_gb": {side: round(found["peak_gb"], 2) for side, found in sides.items()},
    }


def drawn(benchmark: str, folder: Path, items: int) -> DrawnQuestions:
    """Questions as the measure draws them; MMLU's from two subjects."""
    measure = Leaderboard(folder=folder, tasks=(benchmark,), items=items)
    tasks = load_tasks([benchmark], folder)
    names = _SUBJECTS if benchmark == "mmlu" else tuple(tasks)
    return measure.drawn({name: len(tasks[name].eval_docs) for name in names}, 0)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="local files")
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=list(_ITEMS), choices=list(_ITEMS))
    parser.add_argument("--items", type=int, help="questions of each benchmark")
    parser.add_argument("--batch", type=int, default=4, help="rows of lm_eval's batches")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    from prefloop.models.sources import resolve_source

    figures: dict[str, Any] = {}
    for benchmark in options.tasks:
        job = {
            "model": str(resolve_source(options.model)),
            "folder": str(options.folder.resolve()),
            "benchmark": benchmark,
            "batch": options.batch,
            "drawn": drawn(benchmark, options.folder, options.items or _ITEMS[benchmark]),
        }
        sides = {side: in_a_process(side, job) for side in WORKERS}
        figures[benchmark] = compared(benchmark, sides)
        if not options.json:
            print(benchmark, json.dumps(figures[benchmark]))
    if options.json:
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
