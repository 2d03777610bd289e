"""What a measure is. One file per measure; the file's name is the measure's name; no list to edit."""

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
    """The model that is measured, and who helps to measure it."""

    name: str
    """How tables call it."""
    engine: Engine
    """Samples from it and scores answers under it."""
    initial: Engine | None
    """The model from which its training started; None where the subject is no run's policy."""
    model: Any
    """The Hugging Face model itself, adapters merged or active; None for a served one."""
    tokenizer: Any
    judge: OpenJudge | None
    folder: Path
    """Where the measure may keep what it has done so far, so that a killed evaluation goes on; it exists."""
    seed: int
    answers: Path | None = None
    """Where measures share the answers that they draw with the same sampling; None: each keeps its own."""


class Item(Record):
    """What one question, prompt or pair contributed."""

    id: str
    values: dict[str, float]
    """By metric; two subjects are compared on the items that both have."""
    group: str = ""
    """Task, category or attack, for tables by part."""
    cluster: str = ""
    """Equal for items that are not independent, such as answers to one prompt; "": it stands alone."""
    texts: dict[str, str] = Field(default_factory=dict)
    """What was seen (answer, verdict ...), for the person who looks; left out where it must not be stored."""


@dataclass(frozen=True)
class Outcome:
    """One measure of one subject."""

    estimates: Mapping[str, Estimate]
    """By metric, in the order in which tables show them."""
    items: tuple[Item, ...] = ()
    facts: Mapping[str, Any] | None = None
    """What it depends on: sizes, versions, the judge and its own error; JSON values."""


class Measure(Options):
    """A measure's fields are its options; `run` measures one subject."""

    suites: ClassVar[tuple[Suite, ...]] = ()
    """The suites that hold it; the suite "all" holds every measure."""
    better: ClassVar[Mapping[str, Better]] = {}
    """By metric, which way is better; metrics that are not named: higher."""
    needs_judge: ClassVar[bool] = False
    asks_judge: ClassVar[bool] = False
    """Whether it may ask the judge all the same; measures that declare neither get none, and outlast its change."""
    needs_initial: ClassVar[bool] = False
    """Whether it compares with the model from which training started."""

    def check(self) -> None:
        """Raise a PrefloopError for what would stop `run` and can be told without a model."""

    def lacks(self, subject: Subject) -> str | None:
        """What this subject lacks for being measured so, with the remedy; None where it lacks nothing."""
        if self.needs_judge and subject.judge is None:
            return "it needs a judge: name one with --judge"
        if self.needs_initial and subject.initial is None:
            return f"{subject.name} is no run's policy: name the model that it started from with --initial"
        return None

    def run(self, subject: Subject) -> Outcome:
        """Measure one subject. The same subject, options and seed give the same outcome."""
        raise NotImplementedError
