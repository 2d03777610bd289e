"""Claim: on a GPU the packed step, the slot engine, the first loss and DDP are as exact as on a CPU, and fast.

One GPU, at most eight minutes, randomly initialised models in the shapes of SmolLM2-135M and 1.7B, no download.
Each part runs in a process of its own, under its own share of the time: what fails is listed and the others
go on. Without a GPU, or with --small, a tiny model takes the same ways in less than a minute.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Tokenizers of the tests' stand in for a downloaded one.
sys.path.insert(0, str(Path(__file__).parents[1]))

from ways.gpu_exact import exactness, first_losses, one_process
from ways.gpu_form import Form, Notes
from ways.gpu_speed import flex, generation, steps


def machine(form: Form, notes: Notes) -> None:
    """What it ran on."""
    notes.figure("python", sys.version.split()[0])
    for name in ("torch", "transformers", "peft", "trl"):
        notes.figure(name, version(name) if find_spec(name) else None)
    if form.on_gpu:
        about = torch.cuda.get_device_properties(0)
        notes.figure("gpu", about.name)
        notes.figure("gpu memory, MB", about.total_memory // 2**20)
        notes.figure("cuda", torch.version.cuda)


class Part(NamedTuple):
    """A part, its share of the time (seconds of 480), and whether the small form has it too."""

    work: Callable[[Form, Notes], None]
    seconds: int
    small: bool = True


PARTS: Mapping[str, Part] = {
    "machine": Part(machine, 20),
    "exact": Part(partial(exactness, attention="sdpa", slopes=True), 45),
    "first loss": Part(first_losses, 45),
    "step": Part(partial(steps, large=False), 60),
    "generate": Part(partial(generation, large=False), 70),
    "ddp": Part(one_process, 40),
    "flex": Part(flex, 80),
    "step, 1.7 B": Part(partial(steps, large=True), 60, small=False),
    "generate, 1.7 B": Part(partial(generation, large=True), 60, small=False),
}
"""In the order in which they run: what needs a compiler or much memory comes last."""


def child(name: str, form: Form, path: Path) -> None:
    """One part, in a process of its own."""
    os.setsid()
    os.dup2(2, 1)  # standard output is for the result
    os.environ["TQDM_DISABLE"] = "1"
    notes = Notes(path)
    try:
        PARTS[name].work(form, notes)
    except Exception as error:  # noqa: BLE001 (a failure is a finding; the other parts go on)
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        notes.fail(f"{type(error).__name__}: {first}")


def play(name: str, form: Form, seconds: float) -> dict[str, Any]:
    """A part's findings; its process is ended when its time is over."""
    # A forked process cannot use CUDA if this one has asked for it; without a GPU nothing is imported twice.
    context: Any = multiprocessing.get_context("spawn" if form.on_gpu else "fork")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "notes.json"
        process = context.Process(target=child, args=(name, form, path))
        process.start()
        try:
            process.join(seconds)
        finally:
            late = process.is_alive()
            if late:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        found: dict[str, Any] = (
            json.loads(path.read_text()) if path.exists() else {"figures": {}, "checks": {}}
        )
    if late:
        found["failure"] = f"not done after its {seconds:.0f} seconds"
    elif process.exitcode:
        found["failure"] = f"its process ended with code {process.exitcode}"
    found["seconds"] = round(time.perf_counter() - start, 1)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts; what the script prints."""
    has_gpu = torch.cuda.is_available()
    form = Form("cuda" if has_gpu else "cpu", small=options.small or not has_gpu)
    deadline = time.perf_counter() + options.seconds
    parts: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, part in PARTS.items():
        if form.small and not part.small:
            continue
        left = deadline - time.perf_counter()
        own = part.seconds * options.seconds / sum(p.seconds for p in PARTS.values())
        if left < 1:
            failures[name] = f"not begun: the {options.seconds:.0f} seconds were over"
            continue
        parts[name] = play(name, form, min(own, left))
        print(name, json.dumps(parts[name]), file=sys.stderr, flush=True)
        if "failure" in parts[name]:
            failures[name] = parts[name]["failure"]
    missed = [
        f"{name}: {check}"
        for name, found in parts.items()
        for check, values in found["checks"].items()
        if not values["good"]
    ]
    return {
        "form": "small" if form.small else "full",
        "device": form.device,
        "parts": parts,
        "missed": missed,
        "failures": failures,
    }


def table(found: Mapping[str, Any]) -> str:
    """The findings as Markdown."""
    lines = [
        f"Form: {found['form']}, on {found['device']}.",
        "",
        "| part | what | found | limit | |",
        "|---|---|---|---|---|",
    ]
    for name, part in found["parts"].items():
        for what, value in part["figures"].items():
            lines.append(f"| {name} | {what} | {_said(value)} | | |")
        for what, check in part["checks"].items():
            limit = ", ".join(f"{k} {check[k]:g}" for k in ("most", "least") if k in check)
            good = "good" if check["good"] else "**missed**"
            lines.append(f"| {name} | {what} | {_said(check['value'])} | {limit} | {good} |")
    lines += ["", *(f"Failed: {name}: {why}" for name, why in found["failures"].items())]
    return "\n".join(lines)


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items() if k != "losses")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a tiny model; the form without a GPU")
    parser.add_argument("--seconds", type=float, default=480.0, help="bound of the whole")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found) if options.json else table(found))
    if not any(part["figures"] for name, part in found["parts"].items() if name != "machine"):
        sys.exit("nothing ran; the messages stand above")


if __name__ == "__main__":
    main()
