"""Claim: PPO learns. On the embedded model the mean reward of a round's answers rises from its start to near its best.

Runs a recipe of the method ppo, or goes on with it in the folder given by --keep, and reads what its rounds
left: mean reward with a 95 % interval, answers that end by themselves, words, divergence from the start, and
what the losses reported. The claim holds where the last fifth of the rounds has come more than half way from
the first round's mean to the best possible reward, and its intervals lie above the first round's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from prefloop.records import Candidates, Pair
from prefloop.run_folder import read_metrics, read_run

_LOGGED = ("kl_reference", "entropy", "explained_variance", "clip_fraction", "approx_kl")
_PANELS = (
    ("reward", "mean reward of the round's answers"),
    ("stopped", "share that ended by themselves"),
    ("kl_reference", "KL to the start, nats a token"),
    ("entropy", "entropy, nats a token"),
    ("explained_variance", "explained variance of the values"),
    ("clip_fraction", "share of tokens clipped"),
)


def rounds(run: Path) -> list[dict[str, float]]:
    """One row for each trained round."""
    found = []
    for round_dir in read_run(run).rounds():
        if round_dir.number < 0 or not round_dir.manifest("train"):
            continue
        scores = [pair.scores["chosen"] for pair in round_dir.stream("pairs", Pair)]
        answers = [group.responses["answer"] for group in round_dir.stream("ranked", Candidates)]
        steps = read_metrics(round_dir.train / "metrics.jsonl")
        spread = 1.96 * stdev(scores) / len(scores) ** 0.5
        found.append(
            {
                "round": round_dir.number,
                "answers": len(scores),
                "reward": fmean(scores),
                "half_interval": spread,
                "stopped": fmean(answer.finish == "stop" for answer in answers),
                "words": fmean(len(answer.text.split()) for answer in answers),
                **{name: fmean(step[name] for step in steps) for name in _LOGGED},
            }
        )
    return found


def verdict(rows: list[dict[str, float]], best: float) -> dict[str, Any]:
    """First round against the last fifth of the rounds."""
    last = rows[-max(1, len(rows) // 5) :]
    first, end = rows[0]["reward"], fmean(row["reward"] for row in last)
    low = min(row["reward"] - row["half_interval"] for row in last)
    apart = low > first + rows[0]["half_interval"]
    share = (end - first) / (best - first)
    return {"start": first, "end": end, "best": best, "way": share, "learns": share > 0.5 and apart}


def draw(rows: list[dict[str, float]], best: float, path: Path) -> None:
    """Six panels by round."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.5), sharex=True, layout="constrained")
    at = [row["round"] for row in rows]
    for axis, (name, title) in zip(axes.flat, _PANELS, strict=True):
        values = [row[name] for row in rows]
        axis.plot(at, values, marker="o", markersize=3, color="#1f5fa8")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if name == "reward":
            half = [row["half_interval"] for row in rows]
            low, high = ([v + s * h for v, h in zip(values, half, strict=True)] for s in (-1, 1))
            axis.fill_between(at, low, high, alpha=0.2, color="#1f5fa8", linewidth=0)
            axis.axhline(best, linestyle="--", linewidth=1, color="grey")
    for axis in axes[-1]:
        axis.set_xlabel("round")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="ppo-smollm2-135m")
    parser.add_argument("--set", action="append", default=[], help="as of prefloop run")
    parser.add_argument("--best", type=float, default=1.0, help="the highest possible reward")
    parser.add_argument(
        "--keep", type=Path, help="the run's folder; without, one that is thrown away"
    )
    parser.add_argument("--only-read", action="store_true", help="read --keep as it is")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = options.keep or Path(temporary) / "run"
        if not options.only_read:
            changes = [word for change in options.set for word in ("--set", change)]
            command = [sys.executable, "-m", "prefloop", "run", options.recipe, "--out", str(run)]
            subprocess.run([*command, *changes], check=True, stdout=sys.stderr)
        rows = rounds(run)
    found = verdict(rows, options.best)
    if options.plot:
        draw(rows, options.best, options.plot)
    if options.json:
        print(json.dumps({**found, "rounds": rows}, indent=1))
    else:
        for row in rows:
            print("  ".join(f"{name} {value:.3g}" for name, value in row.items()))
        print(found)
    return 0 if found["learns"] else 1


if __name__ == "__main__":
    sys.exit(main())
