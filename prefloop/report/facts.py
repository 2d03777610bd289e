"""What a report says about one run, read from its folder: numbers and texts, nothing laid out yet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
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
from prefloop.run_folder import RoundDir, RunDir, read_run

LOGRATIOS = "logratios.jsonl"
# Stages as people think of them, by the names of their manifests.
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
    """One round in numbers."""

    number: int
    pairs: int
    reasons: Counter[str]
    """Rejects by reason."""
    margins: list[float]
    """AROP's M of every pair."""
    gaps: list[float]
    """The judge's score of chosen minus rejected, of every pair that has both."""
    generated_tokens: int
    trained_tokens: int
    seconds: dict[str, float]
    """By stage: generate, rank, pair, train, evaluate."""

    @property
    def speed(self) -> dict[str, float | None]:
        """Tokens a second, generated and trained on."""
        made = self.seconds.get("generate", 0.0)
        trained = self.seconds.get("train", 0.0)
        return {
            "generated": self.generated_tokens / made if made and self.generated_tokens else None,
            "trained": self.trained_tokens / trained if trained and self.trained_tokens else None,
        }


@dataclass(frozen=True)
class RunFacts:
    """One run in numbers, with a way to its chains."""

    run: RunDir
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    events: list[dict[str, Any]]
    results: list[RoundResult]
    rounds: list[RoundFacts]
    steps: list[dict[str, Any]]
    """Metrics of each optimiser step, with "round", and "at": the step counted over the whole run."""
    start_seconds: dict[str, float] = field(default_factory=dict)
    """What came before the first round took, by stage."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """The win rate during training, where it was measured: step, win_rate, low, high."""

    def chains(self) -> Iterator[Chain]:
        """Every pair, reject and held-out prompt, newest round last."""
        ratios = {found.pair: found for found in read_ratios(self.run)}
        for round_dir in self.run.rounds():
            yield from round_chains(round_dir, ratios)
        yield from held_out_chains(self.run)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, over all rounds and what came before."""
        total: Counter[str] = Counter()
        for part in (self.start_seconds, *(found.seconds for found in self.rounds)):
            for stage, seconds in part.items():
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
        """Whether it came to its end."""
        return any(event["event"] == "end" for event in self.events)


def read_ratios(run: RunDir) -> Iterator[PairRatios]:
    """The log-ratios that were computed for this run, if any."""
    path = run.path / LOGRATIOS
    return read_jsonl(path, PairRatios) if path.exists() else iter(())


def read_recipe(run: RunDir) -> tuple[str, dict[str, Any]]:
    """The run's recipe, as its file says it and as values. Raises RunFolderError."""
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
    """Everything but the chains. Reads runs that are still going on. Raises RunFolderError."""
    run = read_run(folder)
    text, recipe = read_recipe(run)
    around = folder / "environment.json"
    return RunFacts(
        run=run,
        name=folder.resolve().name,
        recipe=recipe,
        recipe_text=text,
        environment=read_json(around) if around.exists() else {},
        events=run.events(),
        results=run.results(),
        rounds=[_round(round_dir) for round_dir in run.rounds()],
        steps=list(_steps(run)),
        start_seconds=_seconds(run.start),
        curve=[
            row
            for round_dir in run.rounds()
            for row in _rows(round_dir, round_dir.path / "curve.jsonl")
        ],
    )


def _round(round_dir: RoundDir) -> RoundFacts:
    margins, gaps, pairs = [], [], 0
    if round_dir.manifest("pairs"):
        for pair in round_dir.stream("pairs", Pair):
            pairs += 1
            margins.append(pair.margin)
            if {"chosen", "rejected"} <= pair.scores.keys():
                gaps.append(pair.scores["chosen"] - pair.scores["rejected"])
    trained = round_dir.manifest("train") or {}
    return RoundFacts(
        number=round_dir.number,
        pairs=pairs,
        reasons=_reasons(round_dir),
        margins=margins,
        gaps=gaps,
        generated_tokens=_generated(round_dir),
        trained_tokens=int(trained.get("tokens", 0)),
        seconds=_seconds(round_dir),
    )


def _reasons(round_dir: RoundDir) -> Counter[str]:
    return Counter(f"{reject.stage}: {reject.reason}" for reject in _kept_rejects(round_dir))


def _kept_rejects(round_dir: RoundDir) -> Iterator[Reject]:
    # A line of a chunk that is being written right now is no record yet.
    return round_dir.rejects() if round_dir.manifest("candidates") else iter(())


def _generated(round_dir: RoundDir) -> int:
    if not round_dir.manifest("candidates"):
        return 0
    # An ablation may use one response under two names; its tokens were made once.
    return sum(
        len(ids)
        for group in round_dir.stream("candidates", Candidates)
        for ids in {response.token_ids for response in group.responses.values()}
    )


def _seconds(round_dir: RoundDir) -> dict[str, float]:
    total: dict[str, float] = {}
    for name, stage in _STAGES.items():
        facts = round_dir.manifest(name)
        if facts and "seconds" in facts:
            total[stage] = total.get(stage, 0.0) + float(facts["seconds"])
    return total


def _steps(run: RunDir) -> Iterator[dict[str, Any]]:
    at = 0
    for round_dir in run.rounds():
        for row in _rows(round_dir, round_dir.train / "metrics.jsonl"):
            at += 1
            yield {**row, "round": round_dir.number, "at": at}


def _rows(round_dir: RoundDir, path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that may be growing; a last one that is half written is left out."""
    round_dir.sealed("train").verify([path])
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise RunFolderError(
                f"{path}:{number} is damaged; delete {round_dir.path} to redo the round"
            ) from error


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation says of one subject."""

    subject: str
    run: int | None
    """Which of the page's runs it is a policy of; None for another model."""
    estimates: dict[str, dict[str, float]]
    """By "measure: metric": value, low, high, count."""


def read_evaluation(path: Path, runs: Sequence[RunFacts]) -> list[Evaluated]:
    """The subjects of an evaluation.json, or of the folder it lies in. Raises RunFolderError."""
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
    """A source is a run's folder, perhaps with "@ROUND" behind it."""
    folders = {Path(source).resolve(), Path(source.rpartition("@")[0] or source).resolve()}
    return next((n for n, run in enumerate(runs) if run.run.path.resolve() in folders), None)
