"""Claim: vLLM and the engine in process generate as one policy does, and a killed vLLM costs one chunk.

Plays the same IAL recipe with both engines and compares what came out, by round; with --kill, plays it
once more, kills vLLM's engine process in the middle of the first round, and goes on with the same command.
A folder given by --keep keeps the runs, and finished ones are not played again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from prefloop.records import Candidates
from prefloop.run_folder import read_run

_MEASURES = ("score", "win_rate", "kl", "distinct_2", "mean_length", "stop_rate", "train_loss")
_SUSPICIOUS = 4.0
"""Standard errors between the drafts of two engines over one policy: by chance once in 16,000 times."""


def recipe(options: argparse.Namespace, engine: dict[str, Any]) -> dict[str, Any]:
    short = {"temperature": 0.7, "max_new_tokens": options.tokens}
    return {
        "model": {"source": options.model, "device": "cpu", "dtype": options.dtype},
        "method": {"name": "ial", "sampling": short, "advice": short, "gates": {"cut_off": False}},
        "judge": {"name": "similarity"},
        "engine": engine,
        "loop": {"rounds": options.rounds, "prompts_per_round": options.prompts},
        "train": {
            "epochs": 1,
            "lr": 1e-4,
            "optimizer": "adamw",
            "batch_size": 8,
            "micro_batch_size": 4,
        },
        "generate": {"chunk_size": 12},
        "evaluate": {"prompts": options.held_out, "introspection": False},
        "guard": {"min_stop_rate": 0.0},
    }


def command(options: argparse.Namespace, name: str, folder: Path) -> list[str]:
    engine = {"name": "hf"} if name == "hf" else {"name": "vllm", "eager": True, "max_num_seqs": 32}
    if name != "hf":
        engine["python"] = options.vllm_python
    path = folder / f"{name}.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(recipe(options, engine)))
    return [sys.executable, "-m", "prefloop", "run", str(path), "--out", str(folder / name)]


def play(options: argparse.Namespace, name: str, folder: Path) -> float:
    """Play a run to its end; its wall time in seconds."""
    since = time.perf_counter()
    done = subprocess.run(
        command(options, name, folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout}{done.stderr[-2000:]}")
    return time.perf_counter() - since


def facts(folder: Path) -> list[dict[str, Any]]:
    """By round: pairs, the drafts' scores and lengths, seconds of generation, and the measures."""
    run = read_run(folder)
    measures = {result.round: result.measures for result in run.results()}
    found = []
    for round_dir in run.rounds():
        groups = round_dir.records("ranked", Candidates)
        manifest = round_dir.manifest("candidates") or {}
        found.append(
            {
                "round": round_dir.number,
                "pairs": round_dir.count("pairs"),
                "draft_score": [group.scores["draft"] for group in groups],
                "draft_tokens": [
                    float(len(group.responses["draft"].token_ids)) for group in groups
                ],
                "seconds": manifest.get("seconds"),
                **{key: measures.get(round_dir.number, {}).get(key) for key in _MEASURES},
            }
        )
    return found


def distance(first: list[float], second: list[float]) -> float:
    """Difference of two means in standard errors."""
    error = math.sqrt(stdev(first) ** 2 / len(first) + stdev(second) ** 2 / len(second))
    return (fmean(first) - fmean(second)) / error if error else 0.0


def compare(folder: Path) -> list[dict[str, Any]]:
    """Both runs side by side, round by round."""
    rows = []
    for ours, theirs in zip(facts(folder / "hf"), facts(folder / "vllm"), strict=True):
        row: dict[str, Any] = {"round": ours["round"]}
        for key in ("draft_score", "draft_tokens"):
            row[key] = [fmean(ours[key]), fmean(theirs[key])]
            row[f"{key}_z"] = distance(ours[key], theirs[key])
        row |= {key: [ours[key], theirs[key]] for key in ("pairs", "seconds", *_MEASURES)}
        rows.append(row)
    return rows


def descendants(pid: int) -> list[int]:
    """Processes that a process started, directly or not."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """SIGKILL to vLLM's engine process once the first round has its first chunk; then the same command."""
    first = folder / "killed" / "rounds" / "0000" / "candidates.jsonl"
    with subprocess.Popen(
        command(options, "killed", folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        while run.poll() is None and not (first.exists() and first.stat().st_size):
            time.sleep(0.02)
        started = descendants(run.pid)
        cores = [pid for pid in started if "EngineCore" in words(pid)]
        for pid in cores:
            os.kill(pid, signal.SIGKILL)
        said = run.communicate()[0].decode().strip().splitlines()
    left = [pid for pid in started if words(pid)]
    seconds = play(options, "killed", folder)
    same = [
        (folder / name / "rounds" / "0000" / "candidates.jsonl").read_bytes().count(b"\n")
        for name in ("killed", "vllm")
    ]
    return {
        "killed": len(cores),
        "exit": run.returncode,
        "said": said[-1] if said else "",
        "processes_left": len(left),
        "resumed_seconds": seconds,
        "candidates": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm-python", required=True, help="Python of the environment with vLLM")
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--kill", action="store_true", help="kill vLLM too, and go on")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; finished ones are used")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        seconds = {name: play(options, name, folder) for name in ("hf", "vllm")}
        found: dict[str, Any] = {"seconds": seconds, "rounds": compare(folder)}
        if options.kill:
            found["kill"] = kill(options, folder)
    if options.json:
        print(json.dumps(found))
    else:
        for row in found["rounds"]:
            print(*(f"{key}={value}" for key, value in row.items()), sep="\n  ")
        print(found.get("kill", ""))
    # Only in round 0 are both engines asked for the same policy.
    first = found["rounds"][0]
    fair = all(abs(first[key]) < _SUSPICIOUS for key in ("draft_score_z", "draft_tokens_z"))
    killed = found.get("kill")
    recovered = not killed or (killed["exit"] == 2 and not killed["processes_left"])
    sys.exit(0 if fair and recovered else 1)


if __name__ == "__main__":
    main()
