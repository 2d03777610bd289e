"""The base class of measures. One file per measure; its name is the measure's name; no list to edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from prefloop.config import Options
from prefloop.evaluate.stats import Estimate
from prefloop.records import Record

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.judges import OpenJudge

Better = Literal["higher", "lower", "neither"]
Suite = Literal["quick", "safety", "leaderboard"]


@dataclass(frozen=True)
class Subject:
    """The model that is measured, with the engines, judge and folders that measures may use."""

    name: str
    """Its name in tables."""
    engine: Engine
    """Samples from the model and scores answers under it."""
    initial: Engine | None
    """Engine of the model from which training started; None where that is not known."""
    model: Any
    """The Hugging Face model, adapters merged or active; None where a server holds it."""
    tokenizer: Any
    judge: OpenJudge | None
    folder: Path
    """Existing folder for the measure's unfinished work, so that a killed evaluation can continue."""
    seed: int
    answers: Path | None = None
    """Folder of answers that measures with equal sampling share; None: each measure keeps its own."""


class Item(Record):
    """The result on one question, prompt or pair."""

    id: str
    values: dict[str, float]
    """Metric -> value; two subjects are compared on the items that both have."""
    group: str = ""
    """Task, category or attack, for tables by part."""
    cluster: str = ""
    """Equal for items that are not independent, such as answers to one prompt; "": independent of all others."""
    texts: dict[str, str] = Field(default_factory=dict)
    """Texts for the reader (answer, verdict ...); left out where they must not be stored."""


@dataclass(frozen=True)
class Outcome:
    """The result of one measure on one subject."""

    estimates: Mapping[str, Estimate]
    """Metric -> estimate, in the order of tables."""
    items: tuple[Item, ...] = ()
    facts: Mapping[str, Any] | None = None
    """What the result depends on: sizes, versions, the judge and its error; JSON values."""


class Measure(Options):
    """A measure's fields are its options; `run` measures one subject."""

    suites: ClassVar[tuple[Suite, ...]] = ()
    """The suites that contain the measure; the suite "all" contains every measure."""
    better: ClassVar[Mapping[str, Better]] = {}
    """Metric -> which direction is better; "higher" where a metric is not listed."""
    needs_judge: ClassVar[bool] = False
    asks_judge: ClassVar[bool] = False
    """Whether it can use a judge but does not need one; results of measures with neither survive a change of judge."""
    needs_initial: ClassVar[bool] = False
    """Whether it compares with the model from which training started."""

    def check(self) -> None:
        """Raise a PrefloopError for anything that would stop `run` and shows without loading a model."""

    def lacks(self, subject: Subject) -> str | None:
        """Why this subject cannot be measured, with the remedy; None where it can."""
        if self.needs_judge and subject.judge is None:
            return "it needs a judge: name one with --judge"
        if self.needs_initial and subject.initial is None:
            return f"{subject.name} is no run's policy: name the model that it started from with --initial"
        return None

    def reads(self) -> str:
        """What decides the result beside options and the contents of the files that they name, as text."""
        return ""

    def run(self, subject: Subject) -> Outcome:
        """Measure one subject. The same subject, options and seed give the same outcome."""
        raise NotImplementedError
