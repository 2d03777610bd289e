"""What a report says about one run, read from its folder: numbers and texts, nothing laid out yet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from prefloop.errors import RunFolderError
from prefloop.records import Candidates, Pair, PairRatios, Reject, RoundResult, read_json, read_jsonl
from prefloop.report.chain import Chain, held_out_chains, round_chains
from prefloop.rundir import RoundDir, RunDir, read_run

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
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    """What prefloop evaluate measured of this run."""

    def chains(self) -> Iterator[Chain]:
        """Every pair, reject and held-out prompt, newest round last."""
        ratios = {found.pair: found for found in read_ratios(self.run)}
        for here in self.run.rounds():
            yield from round_chains(here, ratios)
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


def read_facts(folder: Path) -> RunFacts:
    """Everything but the chains. Reads runs that are still going on. Raises RunFolderError."""
    run = read_run(folder)
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunFolderError(f"{folder}/recipe.yaml is damaged ({error})") from error
    around = folder / "environment.json"
    return RunFacts(
        run=run,
        name=folder.resolve().name,
        recipe=recipe if isinstance(recipe, dict) else {},
        recipe_text=text,
        environment=read_json(around) if around.exists() else {},
        events=run.events(),
        results=run.results(),
        rounds=[_round(here) for here in run.rounds()],
        steps=list(_steps(run)),
        start_seconds=_seconds(run.start),
    )


def _round(here: RoundDir) -> RoundFacts:
    margins, gaps, pairs = [], [], 0
    if here.manifest("pairs"):
        for pair in here.stream("pairs", Pair):
            pairs += 1
            margins.append(pair.margin)
            if {"chosen", "rejected"} <= pair.scores.keys():
                gaps.append(pair.scores["chosen"] - pair.scores["rejected"])
    trained = here.manifest("train") or {}
    return RoundFacts(
        number=here.number,
        pairs=pairs,
        reasons=_reasons(here),
        margins=margins,
        gaps=gaps,
        generated_tokens=_generated(here),
        trained_tokens=int(trained.get("tokens", 0)),
        seconds=_seconds(here),
    )


def _reasons(here: RoundDir) -> Counter[str]:
    return Counter(f"{reject.stage}: {reject.reason}" for reject in _kept_rejects(here))


def _kept_rejects(here: RoundDir) -> Iterator[Reject]:
    # A line of a chunk that is being written right now is no record yet.
    return here.rejects() if here.manifest("candidates") else iter(())


def _generated(here: RoundDir) -> int:
    if not here.manifest("candidates"):
        return 0
    # An ablation may use one response under two names; its tokens were made once.
    return sum(
        len(ids)
        for group in here.stream("candidates", Candidates)
        for ids in {response.token_ids for response in group.responses.values()}
    )


def _seconds(here: RoundDir) -> dict[str, float]:
    total: dict[str, float] = {}
    for name, stage in _STAGES.items():
        facts = here.manifest(name)
        if facts and "seconds" in facts:
            total[stage] = total.get(stage, 0.0) + float(facts["seconds"])
    return total


def _steps(run: RunDir) -> Iterator[dict[str, Any]]:
    at = 0
    for here in run.rounds():
        path = here.train / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RunFolderError(
                    f"{path}:{number} is damaged; delete {here.path} to redo the round"
                ) from error
            at += 1
            yield {**row, "round": here.number, "at": at}
