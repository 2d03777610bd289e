"""Claim: a training step costs what its distinct tokens cost, until attention outgrows the linear layers.

Times the step on one group at a time, over lengths and numbers of answers, half of each answer shared;
prints the points and draws them, beside the same groups as padded rows. Seconds are the process's own;
set OMP_NUM_THREADS=1, or threads that wait for each other count as well.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch

from prefloop.machine import keep_freed_memory
from prefloop.models.policy import ModelOptions, Policy
from prefloop.train.logprobs import group_logprobs
from prefloop.train.packing import TokenGroup, build_tree

_PROMPT = 64
_LONGEST_PADDED = 2000


class Point(NamedTuple):
    """One measurement."""

    answers: int
    length: int
    """Tokens of each answer."""
    sequence_tokens: int
    """Tokens of all sequences, one at a time."""
    distinct_tokens: int
    tree_seconds: float
    padded_seconds: float | None
    """None where it would take too long."""


def draw(answers: int, length: int, vocabulary: int) -> TokenGroup:
    """Random tokens; the answers share their first half."""
    rng = random.Random(length)
    total = _PROMPT + length // 2 + answers * (length - length // 2)
    tokens = [rng.randrange(10, vocabulary) for _ in range(total)]
    prompt, shared, rest = (
        tokens[:_PROMPT],
        tokens[_PROMPT : _PROMPT + length // 2],
        tokens[_PROMPT + length // 2 :],
    )
    own = length - length // 2
    ends = (rest[n * own : (n + 1) * own] for n in range(answers))
    return TokenGroup(tuple(prompt), tuple((*shared, *end) for end in ends))


def seconds(policy: Policy, group: TokenGroup, *, packing: bool) -> float:
    """Of one forward and backward pass: the process's own, all threads together."""
    policy.model.zero_grad()
    start = time.process_time()
    logps = group_logprobs(policy.model, [group], packing=packing, token_budget=1)
    torch.cat(logps[0]).sum().backward()  # type: ignore[no-untyped-call]
    return time.process_time() - start


def measure(options: argparse.Namespace) -> list[Point]:
    keep_freed_memory()
    policy = Policy.load(ModelOptions(source=options.model, device="cpu", dtype="float32"))
    policy.model.train()
    vocabulary = policy.model.config.vocab_size
    seconds(policy, draw(2, max(options.lengths), vocabulary), packing=True)
    points = []
    for answers in options.answers:
        for length in options.lengths:
            group = draw(answers, length, vocabulary)
            alone = answers * (_PROMPT + length)
            tree = seconds(policy, group, packing=True)
            padded = (
                seconds(policy, group, packing=False)
                if answers > 1 and alone <= _LONGEST_PADDED
                else None
            )
            size = build_tree(group).size
            points.append(Point(answers, length, alone, size, tree, padded))
    return points


def plot(points: list[Point], path: Path) -> None:
    """Seconds against distinct tokens, a line for each number of answers."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    rate = min(p.tree_seconds / p.distinct_tokens for p in points)
    ends = [min(p.distinct_tokens for p in points), max(p.distinct_tokens for p in points)]
    axes.plot(ends, [rate * x for x in ends], color="0.6", lw=1, label="constant cost a token")
    for n, answers in enumerate(sorted({p.answers for p in points})):
        own = [p for p in points if p.answers == answers]
        label = f"{answers} answer" + "s" * (answers > 1)
        x = [p.distinct_tokens for p in own]
        axes.plot(x, [p.tree_seconds for p in own], "o-", color=f"C{n}", label=label)
        padded = [p for p in own if p.padded_seconds is not None]
        if padded:
            y = [p.padded_seconds for p in padded]
            x = [p.distinct_tokens for p in padded]
            axes.plot(x, y, "x--", color=f"C{n}", alpha=0.6, label=f"{label}, padded rows")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="distinct tokens of the group",
        ylabel="seconds, one thread",
    )
    axes.set_title("One training step (forward and backward)")
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="embedded:smollm2-135m", help="as in model.source")
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--plot", type=Path, help="where to draw the points (needs matplotlib)")
    parser.add_argument("--read", type=Path, help="draw these points, printed before, instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.read:
        points = [Point(**point) for point in json.loads(options.read.read_text())["points"]]
    else:
        points = measure(options)
    if options.plot:
        plot(points, options.plot)
    if options.json:
        print(json.dumps({"points": [point._asdict() for point in points]}))
        return
    for point in points:
        print(*(f"{name} {value}" for name, value in point._asdict().items()), sep="  ")


if __name__ == "__main__":
    main()
