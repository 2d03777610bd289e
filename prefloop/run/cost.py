"""What a run has spent, read from its manifests, and what it may spend at most.

Measuring the policy is not counted: it costs the same whatever is measured, and no method needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefloop.recipe.options import Budget
from prefloop.records import GENERATED, READ
from prefloop.run_folder import RoundDir, RunDir

if TYPE_CHECKING:
    from prefloop.recipe import Recipe


# Stages that cost, by what people call them.
_COSTS = {
    "sft": "train",
    "candidates": "generate",
    "ranked": "rank",
    "pairs": "pair",
    "train": "train",
}

_MEASURING = ("answers", "introspection")


@dataclass(frozen=True)
class Spent:
    """What a run's stages have cost so far."""

    generated_tokens: int
    read_tokens: int
    """Prompts and given answers that the method put through the policy; what a judge reads is not counted."""
    trained_tokens: int
    flops: float
    seconds_by_stage: dict[str, float]
    """generate, rank, pair, train, evaluate; of a stage that was killed, the last attempt's."""
    peak_memory_mb: float
    """Of the largest process that worked for the run."""

    @property
    def seconds(self) -> float:
        """Wall time of all stages but measuring."""
        return sum(self.seconds_by_stage.values()) - self.seconds_by_stage.get("evaluate", 0.0)

    def fraction_used(self, budget: Budget) -> float:
        """How much of the budget is used; 1 where a limit is reached."""
        return max(float(getattr(self, name)) / limit for name, limit in budget.limits.items())


def spent(run: RunDir, recipe: Recipe) -> Spent:
    """Add up the manifests of a run."""
    manifests = list(_manifests(run))
    seconds: dict[str, float] = {}
    for stage, manifest in manifests:
        name = _COSTS.get(stage, "evaluate")
        seconds[name] = seconds.get(name, 0.0) + float(manifest["seconds"])
    costs = [manifest for stage, manifest in manifests if stage in _COSTS]

    def total(key: str) -> int:
        return sum(int(manifest.get(key, 0)) for manifest in costs)

    return Spent(
        generated_tokens=total(GENERATED),
        read_tokens=total(READ),
        trained_tokens=total("tokens"),
        flops=_flops(recipe, costs),
        seconds_by_stage={name: round(value, 1) for name, value in seconds.items()},
        peak_memory_mb=max((m.get("peak_memory_mb", 0.0) for _, m in manifests), default=0.0),
    )


SECONDS = ("generate_seconds", "train_seconds")
"""A round's wall time of making pairs (generation, ranking, building) and of training (IAL, Table 5)."""


def round_seconds(round_dir: RoundDir) -> dict[str, float | None]:
    """The round's seconds by `SECONDS`; None where it has no such stage, as the start has none."""
    seconds: dict[str, float | None] = dict.fromkeys(SECONDS)
    for stage, kind in _COSTS.items() if round_dir.number >= 0 else ():
        if manifest := round_dir.manifest(stage):
            name = SECONDS[kind == "train"]
            seconds[name] = (seconds[name] or 0.0) + float(manifest["seconds"])
    return seconds


def _manifests(run: RunDir) -> Iterator[tuple[str, dict[str, Any]]]:
    for round_dir in [run.start, *run.rounds()]:
        for stage in (*_COSTS, *_MEASURING):
            if manifest := round_dir.manifest(stage):
                yield stage, manifest


def _flops(recipe: Recipe, costs: list[dict[str, Any]]) -> float:
    """2 N for each token that is read, drawn or seen by the reference; for each trained one, by its passes.

    A trained token's passes of 2 N each: forward, gradients of activations, gradients of weights (not where an
    adapter leaves the weights alone), and the forward pass again where checkpointing recomputes it.
    N are the weights that multiply every token. Attention's share, which grows with length, is left out.
    """
    weights = max((int(manifest.get("parameters", 0)) for manifest in costs), default=0)
    passes = 2 + (recipe.model.tuning == "full") + recipe.model.gradient_checkpointing
    tokens = sum(
        int(manifest.get(key, 0)) * times
        for manifest in costs
        for key, times in ((GENERATED, 1), (READ, 1), ("reference_tokens", 1), ("tokens", passes))
    )
    return 2.0 * weights * tokens
