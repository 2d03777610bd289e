"""The tables and sentences of the report's page, as plain values for its template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from prefloop.errors import counted
from prefloop.records import RoundResult
from prefloop.report.console import (
    arrow,
    duration,
    format_values,
    measure_names,
    round_name,
    total_change,
    visible_rounds,
)
from prefloop.report.facts import Evaluated, RunFacts
from prefloop.report.meanings import round_meaning

# Fraction of rejects from which the page's top warns of them.
_MANY_REJECTS = 0.3


def about(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Rows of the overview: a label and one value per run; rows that no run has are left out."""
    rows = {
        "method": [_get(run, "method", "name") for run in runs],
        "model": [_model(run) for run in runs],
        "prompts": [_get(run, "data", "train") for run in runs],
        "judge": [_get(run, "judge", "name") for run in runs],
        "rounds": [_rounds(run) for run in runs],
        "training": [_training(run) for run in runs],
        "pairs": [_pairs(run) for run in runs],
        "time": [_time(run) for run in runs],
        "tokens": [_tokens(run) for run in runs],
        "begun": [f"{run.began:%Y-%m-%d %H:%M} UTC" if run.began else "" for run in runs],
        "machine": [_machine(run) for run in runs],
        "versions": [_versions(run) for run in runs],
        "seed": [_get(run, "seed") for run in runs],
    }
    return [(label, values) for label, values in rows.items() if any(values)]


def recipe_differences(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """The options in which the runs' recipes differ, with each run's value."""
    first, *others = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in (first, *others) for key in recipe)
    return [
        (key, [str(recipe.get(key, "")) for recipe in (first, *others)])
        for key in keys
        if key != "name" and any(recipe.get(key) != first.get(key) for recipe in others)
    ]


def notices(run: RunFacts) -> list[dict[str, str]]:
    """Warnings at the page's top: guards, many rejects, a run that has not ended."""
    entries = [
        {"kind": "bad", "head": f"Guard, round {number}:", "text": sentence}
        for number, sentence in run.guards
    ]
    pairs = sum(round_dir.pairs for round_dir in run.rounds)
    rejects = sum(round_dir.reasons.total() for round_dir in run.rounds)
    if rejects and rejects / (pairs + rejects) > _MANY_REJECTS:
        text = f"{rejects:,} of {counted(pairs + rejects, 'prompt')} gave no pair; see the reasons below."
        entries.append({"kind": "warn", "head": "Many rejects:", "text": text})
    if not run.finished:
        text = "what is shown is what it has made so far."
        entries.append({"kind": "warn", "head": "This run has not ended:", "text": text})
    if not run.guards and run.results:
        entries.append({"kind": "", "head": "", "text": "no guard tripped."})
    return entries


def measures(run: RunFacts, *, training: bool) -> dict[str, Any]:
    """Measures by round with the change from the first to the last, as on the console.

    `training` chooses those of training, or all others; intervals are in their measure's row.
    """
    shown = visible_rounds(run.results)
    head = ["", *("…" if result is None else round_name(result.round) for result in shown)]
    rows = []
    for name in measure_names(run.results):
        if name.startswith("train_") != training or name.endswith(("_low", "_high")):
            continue
        history = [result.measures.get(name) for result in run.results]
        texts = {
            result.round: (_interval(result, name), text + arrow(before, after))
            for result, text, (before, after) in zip(
                run.results, format_values(history), pairwise([None, *history]), strict=True
            )
        }
        cells = [("", "…") if result is None else texts[result.round] for result in shown]
        meaning = round_meaning(name)
        row = {"name": name, "words": meaning.words, "note": meaning.note, "cells": cells}
        rows.append({**row, "change": total_change(history)})
    return {"head": [*head, "change"], "rows": rows}


def _interval(result: RoundResult, name: str) -> str:
    low, high = (result.measures.get(f"{name}_{end}") for end in ("low", "high"))
    return "" if low is None or high is None or low == high else f"{low:.2f} to {high:.2f}"


def rejects(run: RunFacts) -> list[dict[str, Any]]:
    """One row for pairs and one per reason of rejection: counts by round and the share of all prompts."""
    reasons = dict.fromkeys(
        reason for round_dir in run.rounds for reason in sorted(round_dir.reasons)
    )
    counts = {"pairs": [round_dir.pairs for round_dir in run.rounds]}
    counts |= {
        reason: [round_dir.reasons[reason] for round_dir in run.rounds] for reason in reasons
    }
    total = max(1, sum(sum(row) for row in counts.values()))
    return [
        {"name": name, "cells": row, "total": sum(row), "share": round(sum(row) / total, 4)}
        for name, row in counts.items()
    ]


def evaluations(subjects: Sequence[Evaluated]) -> dict[str, Any] | None:
    """The table of evaluations, one column per subject; None without any."""
    if not subjects:
        return None
    names = dict.fromkeys(name for subject in subjects for name in subject.estimates)
    return {
        "subjects": subjects,
        "rows": [
            {"name": name, "cells": [_estimate(subject, name) for subject in subjects]}
            for name in names
        ],
    }


def _estimate(subject: Evaluated, name: str) -> dict[str, Any]:
    estimate = subject.estimates.get(name)
    if estimate is None:
        return {"run": subject.run, "value": "", "interval": ""}
    low, high = (f"{estimate[end]:.3f}" for end in ("low", "high"))
    interval = f"{low} to {high}, {estimate['count']:,}"
    return {"run": subject.run, "value": f"{estimate['value']:.3f}", "interval": interval}


def _get(run: RunFacts, *path: str) -> str:
    value: Any = run.recipe
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return "" if value is None else str(value)


def _model(run: RunFacts) -> str:
    tuning = _get(run, "model", "tuning")
    return f"{_get(run, 'model', 'source')}{f', {tuning}' if tuning else ''}"


def _rounds(run: RunFacts) -> str:
    planned = _get(run, "loop", "rounds")
    played = sum("train" in round_dir.seconds for round_dir in run.rounds)
    count = f"{played} of {planned}" if planned and planned != str(played) else str(played)
    size = _get(run, "loop", "prompts_per_round")
    return f"{count}, {counted(int(size), 'prompt')} each" if size else count


def _training(run: RunFacts) -> str:
    parts = [
        f"{label}{_get(run, 'train', key)}"
        for key, label in (("optimizer", ""), ("lr", "lr "), ("batch_size", "batch "))
        if _get(run, "train", key)
    ]
    steps = counted(len(run.steps["at"]), "step") if run.steps["at"] else ""
    return ", ".join(part for part in (*parts, steps) if part)


def _pairs(run: RunFacts) -> str:
    pairs = sum(round_dir.pairs for round_dir in run.rounds)
    total = sum(round_dir.reasons.total() for round_dir in run.rounds)
    return f"{pairs:,}, and {counted(total, 'reject')}" if total else f"{pairs:,}, no rejects"


def _time(run: RunFacts) -> str:
    seconds = run.seconds
    if not seconds:
        return ""
    parts = ", ".join(f"{stage} {duration(value)}" for stage, value in seconds.items() if value > 1)
    return duration(sum(seconds.values())) + (f" ({parts})" if parts else "")


def _tokens(run: RunFacts) -> str:
    generated = sum(round_dir.generated_tokens for round_dir in run.rounds)
    trained = sum(round_dir.trained_tokens for round_dir in run.rounds)
    return f"{generated:,} generated, {trained:,} trained on" if generated or trained else ""


def _machine(run: RunFacts) -> str:
    platform, count = run.environment.get("platform"), run.environment.get("processor_count")
    return f"{platform}, {counted(int(count or 0), 'processor')}" if platform else ""


def _versions(run: RunFacts) -> str:
    versions = run.environment.get("versions")
    if not isinstance(versions, dict):
        return ""
    return ", ".join(f"{name} {versions[name]}" for name in versions)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flat(inner, f"{prefix}.{key}".lstrip(".")).items()
    }
