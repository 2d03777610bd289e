"""Claim: a training step computes what a pair's answers share once, and is faster and smaller for it.

Times one step (log-probs, loss, backward pass; no optimiser, which is the same for all) of this package
beside the step of TRL's DPOTrainer on the same pairs and model, taking turns in one process: TRL's own
`training_step` on its own collated batch, reference log-probs given, with the fastest of its settings
here. Triples, which TRL has no trainer for, are compared with three padded rows. Peak memory is taken
from a process for each. All ways must give the same loss.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ways.steps import (
    CASES,
    TRL_SETTINGS,
    Batch,
    Step,
    draw_groups,
    own_step,
    plain_step,
    read_groups,
    trl_step,
)

from prefloop.machine import keep_freed_memory
from prefloop.models.policy import ModelOptions, Policy
from prefloop.train.logprobs import group_logprobs
from prefloop.train.packing import build_tree, pack

DTYPES = ("float32", "bfloat16")


class Bench:
    """A model, and the ways to take a step on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = tempfile.mkdtemp()
        self.clock = time.process_time if options.clock == "cpu" else time.perf_counter
        self.lora = options.tuning == "lora"
        self.policy = self.load(options.tuning)

    def load(self, tuning: str) -> Policy:
        dtype = "float32" if tuning == "full" else self.options.dtype
        model = ModelOptions(source=self.options.model, device="cpu", tuning=tuning, dtype=dtype)
        policy = Policy.load(model)
        policy.model.train()
        return policy

    def step(self, way: str) -> Step:
        budget = self.options.token_budget
        if way in ("tree", "padded"):
            return own_step(self.policy.model, packing=way == "tree", token_budget=budget)
        if way == "plain":
            return plain_step(self.policy.model)
        fused, attention = way != "trl, plain head", "eager" if "eager" in way else "sdpa"
        plain = self.load("full")
        if self.lora:
            # Full fine-tuning is done in float32 alone; TRL's adapter stands on frozen weights as ours does.
            plain.model.to(getattr(torch, self.options.dtype))
        plain.model.config._attn_implementation = attention
        return trl_step(plain, self.lora, fused=fused, folder=self.folder)

    def batch(self, case: str, number: int) -> Batch:
        count, model = self.options.groups, self.policy.model
        if case == "real":
            found = read_groups(self.options.pairs, self.policy, count * (number + 1))
            groups = found[-count:]
        else:
            groups = draw_groups(case, count, model.config.vocab_size, seed=number)
        with torch.inference_mode():
            tokens = group_logprobs(
                model, groups, packing=True, token_budget=self.options.token_budget
            )
        # Apart from the policy, or every loss would be that of the start whatever was computed.
        shift = random.Random(number)
        reference = [[t.sum().item() + shift.uniform(-9, 9) for t in group] for group in tokens]
        return groups, reference


def timed(step: Step, batch: Batch, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds and loss."""
    start = clock()
    loss = step(batch)
    return clock() - start, loss


def linears(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Kind ("body", "adapter", "head"), inputs and outputs of every linear layer."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            kind = "head" if "lm_head" in name else "adapter" if "lora_" in name else "body"
            yield kind, layer.in_features, layer.out_features


def work(model: nn.Module, tokens: int, scored: int, lora: bool) -> float:
    """Floating-point operations that a step's linear layers need: forward, inputs' and weights' gradients."""
    passes = {"body": 2 if lora else 3, "head": 2 if lora else 3, "adapter": 3}
    rows = {"body": tokens, "adapter": tokens, "head": scored}
    return sum(2.0 * rows[kind] * i * o * passes[kind] for kind, i, o in linears(model))


def gemm_rate(model: nn.Module, rows: int, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP/s of bare matrix products in the shapes of the model's body, both ways, best of three."""
    shapes = [(i, o) for kind, i, o in linears(model) if kind == "body"]
    flops = seconds = 0.0
    for i, o in set(shapes):
        x, g, w = (torch.randn(*size, dtype=dtype) for size in ((rows, i), (rows, o), (o, i)))
        out_x, out_g = torch.empty_like(x), torch.empty_like(g)
        best = float("inf")
        for _ in range(4):
            start = clock()
            torch.mm(x, w.t(), out=out_g)
            torch.mm(g, w, out=out_x)
            best = min(best, clock() - start)
        seconds += shapes.count((i, o)) * best
        flops += shapes.count((i, o)) * 4.0 * rows * i * o
    return flops / seconds


def shares(batches: Sequence[Batch]) -> dict[str, float]:
    """How much of a padded batch is padding, and how many of its real tokens are distinct."""
    padded = real = distinct = 0
    for groups, _ in batches:
        sizes = [len(g.prompt) + len(c) for g in groups for c in g.completions]
        padded += len(sizes) * max(sizes)
        real += sum(sizes)
        distinct += sum(build_tree(group).size for group in groups)
    return {"padding": 1 - real / padded, "distinct": distinct / real}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def a_little(batch: Batch) -> Batch:
    """One group, to warm up on."""
    groups, reference = batch
    return groups[:1], reference[:1]


def best_of_trl(bench: Bench, batch: Batch) -> tuple[str, dict[str, float]]:
    """The fastest of TRL's settings, and the seconds of a step in each."""
    seconds = {}
    for way in TRL_SETTINGS:
        step = bench.step(way)
        step(a_little(batch))
        seconds[way] = timed(step, batch, bench.clock)[0]
    return min(seconds, key=lambda way: seconds[way]), seconds


def compare(bench: Bench, case: str, others: dict[str, Step]) -> dict[str, Any]:
    """The tree step and the others in turn on the same batches."""
    batches = [bench.batch(case, n) for n in range(bench.options.steps)]
    ways = {"tree": bench.step("tree"), **others}
    for step in ways.values():
        step(a_little(batches[0]))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    # Sums of a hundred log-probs, each rounded by what other rows stand beside it.
    # TRL takes log-softmax of its plain head in bfloat16 too, and the loss comes out tenths apart.
    tolerance = 1e-3 if bench.policy.model.dtype == torch.float32 else 0.5
    for batch in batches:
        losses = {}
        for way, step in ways.items():
            took, losses[way] = timed(step, batch, bench.clock)
            seconds[way].append(took)
        for way, loss in losses.items():
            assert abs(loss - losses["tree"]) < tolerance * max(1.0, abs(loss)), (way, losses)
    flops = []
    for groups, _ in batches:
        rows = pack(groups, bench.options.token_budget)
        tokens, scored = (
            sum(len(getattr(r, name)) for r in rows) for name in ("input_ids", "targets")
        )
        flops.append(work(bench.policy.model, tokens, scored, bench.lora))
    rows_size = len(pack(batches[0][0], bench.options.token_budget)[0].input_ids)
    rate = gemm_rate(bench.policy.model, rows_size, bench.policy.model.dtype, bench.clock)
    reached = sum(flops) / sum(seconds["tree"])
    return {
        "seconds": {way: spread(values) for way, values in seconds.items()},
        "times_faster": {
            way: spread([o / t for o, t in zip(seconds[way], seconds["tree"], strict=True)])
            for way in others
        },
        **shares(batches),
        "gemm": {"gflops": reached / 1e9, "machine_gflops": rate / 1e9, "share": reached / rate},
    }


def peak(options: argparse.Namespace, way: str, case: str) -> dict[str, float]:
    """Memory of a process of its own, in MB: with the model loaded, and the most during the steps."""
    command = [sys.executable, __file__, "--child", way, case, "--steps", "1"]
    for name in ("model", "tuning", "dtype", "token_budget", "groups"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.pairs:
        command += ["--pairs", str(options.pairs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    say(f"{case} {way} {found}")
    return found


def say(text: str) -> None:
    """Progress; standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def child(options: argparse.Namespace) -> dict[str, float]:
    """What `peak` reads: this process takes some steps in one way only."""
    way, case = options.child
    if way in ("tree", "padded"):
        keep_freed_memory()  # as `prefloop run` does
    bench = Bench(options)
    batches = [bench.batch(case, n) for n in range(options.steps)]
    if not way.startswith("trl"):
        step = bench.step(way)
    else:
        del bench.policy
        gc.collect()
        step = bench.step(way)
    loaded = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    for batch in batches:
        step(batch)
    return {"loaded": loaded, "peak": memory("VmHWM")}


def memory(field: str) -> float:
    """A line of /proc/self/status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this system does not tell a process's memory")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases; the numbers that the script prints."""
    keep_freed_memory()
    cases = [case for case in options.cases.split(",") if case != "real" or options.pairs]
    found: dict[str, Any] = {case: {"what": CASES[case]} for case in cases}
    trl, settings = options.trl, {}
    if options.time:
        bench = Bench(options)
        if trl is None and cases != ["ial"]:
            best, settings = best_of_trl(bench, bench.batch("arop", 0))
            trl = [best]
        for case in cases:
            others = ["plain", "padded"] if case == "ial" else trl
            found[case].update(compare(bench, case, {way: bench.step(way) for way in others}))
            say(f"{case} {found[case]}")
    for case in cases if options.memory else ():
        other = "plain" if case == "ial" else (trl or TRL_SETTINGS)[0]
        mb = {way: peak(options, way, case) for way in ("tree", other)}
        found[case]["memory_mb"] = mb
        found[case]["peak_ratio"] = mb["tree"]["peak"] / mb[other]["peak"]
    return {
        "cases": found,
        "trl_settings_seconds": settings,
        "groups": options.groups,
        "tuning": options.tuning,
        "dtype": options.dtype,
        "token_budget": options.token_budget,
        "clock": options.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="embedded:smollm2-135m", help="as in model.source")
    parser.add_argument("--tuning", choices=["lora", "full"], default="lora")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of frozen weights")
    parser.add_argument("--cases", default=",".join(CASES), help="some of the cases")
    parser.add_argument("--pairs", type=Path, help="a file of `prefloop export`, for the case real")
    parser.add_argument("--groups", type=int, default=4, help="pairs or triples of a step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each way")
    parser.add_argument(
        "--trl", nargs="+", choices=TRL_SETTINGS, help="without, the fastest is found first"
    )
    parser.add_argument("--token-budget", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the process's own time, with OMP_NUM_THREADS=1 on machines that others use too",
    )
    parser.add_argument("--quick", action="store_true", help="one step of two groups, no memory")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--no-time", dest="time", action="store_false")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.groups, options.steps, options.memory = 2, 1, False
    return options


def main() -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")
    options = arguments()
    found = child(options) if options.child else measure(options)
    if options.json or options.child:
        print(json.dumps(found))
        return
    for case, numbers in found["cases"].items():
        print(case, numbers["what"], sep=": ")
        for way, ratio in numbers.get("times_faster", {}).items():
            print(f"  {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) x {way}")
        if "gemm" in numbers:
            print(f"  {numbers['gemm']['share']:.0%} of the rate of bare matrix products")
        if "peak_ratio" in numbers:
            print(f"  {numbers['peak_ratio']:.2f} of the peak memory")
    print(f"TRL's settings, seconds: {found['trl_settings_seconds']}")


if __name__ == "__main__":
    main()
