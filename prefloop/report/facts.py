"""The contents of a report on one run, read from its folder: numbers and texts without layout."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from math import nan
from pathlib import Path
from typing import Any

import yaml

from prefloop.errors import RunFolderError
from prefloop.records import (
    Candidates,
    Pair,
    PairRatios,
    Reject,
    RoundResult,
    read_json,
    read_jsonl,
)
from prefloop.report.chain import Chain, held_out_chains, round_chains
from prefloop.run_folder import METRICS, RoundDir, RunDir, read_run

LOGRATIOS = "logratios.jsonl"
# Name of a manifest -> the stage under which its time is reported.
_STAGES = {
    "candidates": "generate",
    "ranked": "rank",
    "pairs": "pair",
    "sft": "train",
    "train": "train",
    "result": "evaluate",
}


@dataclass(frozen=True)
class RoundFacts:
    """The figures of one round."""

    number: int
    pairs: int
    reasons: Counter[str]
    """Rejects by reason."""
    margins: Sequence[float]
    """AROP's M of every pair."""
    gaps: Sequence[float]
    """The judge's score of chosen minus rejected, of every pair that has both."""
    generated_tokens: int
    trained_tokens: int
    seconds: dict[str, float]
    """Seconds by stage: generate, rank, pair, train, evaluate."""

    @property
    def speed(self) -> dict[str, float | None]:
        """Tokens per second, generated and trained on; None where not known."""
        generating = self.seconds.get("generate", 0.0)
        training = self.seconds.get("train", 0.0)
        return {
            "generated": self.generated_tokens / generating
            if generating and self.generated_tokens
            else None,
            "trained": self.trained_tokens / training if training and self.trained_tokens else None,
        }


@dataclass(frozen=True)
class RunFacts:
    """The figures of one run; `chains` streams its texts."""

    run: RunDir
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    events: list[dict[str, Any]]
    results: list[RoundResult]
    rounds: list[RoundFacts]
    steps: Mapping[str, Sequence[float]]
    """Metrics by name, a number an optimiser step (NaN where it has none), with "round", and "at": the step counted over
    the whole run."""
    start_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds before the first round, by stage."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """The win rate during training, where it was measured: step, win_rate, low, high."""

    def chains(self) -> Iterator[Chain]:
        """Every pair, reject and held-out prompt, newest round last."""
        ratios = {pair_ratios.pair: pair_ratios for pair_ratios in read_ratios(self.run)}
        for round_dir in self.run.rounds():
            yield from round_chains(round_dir, ratios)
        yield from held_out_chains(self.run)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, over the start and all rounds."""
        total: Counter[str] = Counter()
        for by_stage in (self.start_seconds, *(round_facts.seconds for round_facts in self.rounds)):
            for stage, seconds in by_stage.items():
                total[stage] += seconds  # type: ignore[assignment]
        return dict(total)

    @property
    def guards(self) -> list[tuple[int, str]]:
        """Guards that tripped: round and sentence."""
        return [(e["round"], e["sentence"]) for e in self.events if e["event"] == "guard"]

    @property
    def began(self) -> datetime | None:
        """When the run was first started."""
        return datetime.fromisoformat(self.events[0]["time"]) if self.events else None

    @property
    def finished(self) -> bool:
        """Whether the run ended by itself."""
        return any(event["event"] == "end" for event in self.events)


def read_ratios(run: RunDir) -> Iterator[PairRatios]:
    """The log-ratios that were computed for this run, if any."""
    path = run.path / LOGRATIOS
    return read_jsonl(path, PairRatios) if path.exists() else iter(())


def read_recipe(run: RunDir) -> tuple[str, dict[str, Any]]:
    """The run's recipe as text and as values. Raises RunFolderError."""
    path = run.path / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8
        raise RunFolderError(
            f"{path} is damaged ({error}); put back the recipe that the run began with"
        ) from error
    return text, recipe if isinstance(recipe, dict) else {}


def read_facts(folder: Path) -> RunFacts:
    """Read everything but the chains; the run may still be going on. Raises RunFolderError."""
    run = read_run(folder)
    text, recipe = read_recipe(run)
    environment_path = folder / "environment.json"
    return RunFacts(
        run=run,
        name=folder.resolve().name,
        recipe=recipe,
        recipe_text=text,
        environment=read_json(environment_path) if environment_path.exists() else {},
        events=run.events(),
        results=run.results(),
        rounds=[_round(round_dir) for round_dir in run.rounds()],
        steps=_steps(run),
        start_seconds=_seconds(run.start),
        curve=[
            row
            for round_dir in run.rounds()
            for row in _rows(round_dir, round_dir.path / "curve.jsonl")
        ],
    )


def _round(round_dir: RoundDir) -> RoundFacts:
    margins, gaps, pairs = array("d"), array("d"), 0
    if round_dir.manifest("pairs"):
        for pair in round_dir.stream("pairs", Pair):
            pairs += 1
            margins.append(pair.margin)
            if {"chosen", "rejected"} <= pair.scores.keys():
                gaps.append(pair.scores["chosen"] - pair.scores["rejected"])
    train_manifest = round_dir.manifest("train") or {}
    return RoundFacts(
        number=round_dir.number,
        pairs=pairs,
        reasons=_reasons(round_dir),
        margins=margins,
        gaps=gaps,
        generated_tokens=_generated(round_dir),
        trained_tokens=int(train_manifest.get("tokens", 0)),
        seconds=_seconds(round_dir),
    )


def _reasons(round_dir: RoundDir) -> Counter[str]:
    return Counter(f"{reject.stage}: {reject.reason}" for reject in _finished_rejects(round_dir))


def _finished_rejects(round_dir: RoundDir) -> Iterator[Reject]:
    # Before the manifest is there, the last line may be half written.
    return round_dir.rejects() if round_dir.manifest("candidates") else iter(())


def _generated(round_dir: RoundDir) -> int:
    if not round_dir.manifest("candidates"):
        return 0
    # An ablation may use one response under two names; its tokens were generated once.
    return sum(
        len(ids)
        for group in round_dir.stream("candidates", Candidates)
        for ids in {response.token_ids for response in group.responses.values()}
    )


def _seconds(round_dir: RoundDir) -> dict[str, float]:
    total: dict[str, float] = {}
    for name, stage in _STAGES.items():
        manifest = round_dir.manifest(name)
        if manifest and "seconds" in manifest:
            total[stage] = total.get(stage, 0.0) + float(manifest["seconds"])
    return total


def _steps(run: RunDir) -> dict[str, array[float]]:
    columns: dict[str, array[float]] = {"round": array("d"), "at": array("d")}
    step = 0
    for round_dir in run.rounds():
        for row in _rows(round_dir, round_dir.train / METRICS):
            numbers = {key: n for key, n in row.items() if isinstance(n, int | float)}
            for name in numbers:
                if name not in columns:
                    columns[name] = array("d", [nan]) * step
            step += 1
            numbers |= {"round": round_dir.number, "at": step}
            for name, column in columns.items():
                column.append(numbers.get(name, nan))
    return columns


def _rows(round_dir: RoundDir, path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that may be growing; a half-written last line is left out."""
    round_dir.sealed("train").verify([path])
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise RunFolderError(
                    f"{path}:{number} is damaged; delete {round_dir.path} to redo the round"
                ) from error


@dataclass(frozen=True)
class Evaluated:
    """An evaluation's estimates for one subject."""

    subject: str
    run: int | None
    """Index of the page's run that the subject belongs to; None for another model."""
    estimates: dict[str, dict[str, float]]
    """Value, low, high and count, by "measure: metric"."""


def read_evaluation(path: Path, runs: Sequence[RunFacts]) -> list[Evaluated]:
    """The subjects of an evaluation.json, given by its path or folder. Raises RunFolderError."""
    file = path / "evaluation.json" if path.is_dir() else path
    if not file.is_file():
        raise RunFolderError(f"{path} holds no evaluation.json; name what an evaluation wrote")
    try:
        subjects = json.loads(file.read_text(encoding="utf-8"))["subjects"]
        return [
            Evaluated(
                subject=name,
                run=_run_of(str(part["source"]), runs),
                estimates={
                    f"{measure}: {metric}": _numbers(estimate)
                    for measure, row in part["measures"].items()
                    for metric, estimate in row["estimates"].items()
                },
            )
            for name, part in subjects.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{file} is no evaluation that prefloop wrote ({error!r}); name one of prefloop evaluate"
        ) from error


def _numbers(estimate: dict[str, Any]) -> dict[str, float]:
    numbers = {key: float(estimate[key]) for key in ("value", "low", "high")}
    return {**numbers, "count": int(estimate["count"])}


def _run_of(source: str, runs: Sequence[RunFacts]) -> int | None:
    """Index of the run that a source names by its folder, with or without "@ROUND"; None for others."""
    folders = {Path(source).resolve(), Path(source.rpartition("@")[0] or source).resolve()}
    return next((n for n, run in enumerate(runs) if run.run.path.resolve() in folders), None)
