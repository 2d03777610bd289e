"""Several judges as one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

import prefloop.judges
from prefloop.config import build, find_plugin, plugin_name
from prefloop.errors import RecipeError
from prefloop.judges import ALONE, Judge, NoVerdict, OpenJudge, Verdict, finite
from prefloop.records import Prompt

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial


def _built(value: object) -> Judge:
    """A member from its section, as the recipe builds its one judge."""
    if isinstance(value, Judge):
        return value
    name = value.get("name") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not re.fullmatch(r"\w+(\.\w+)*", str(name or "")):
        raise RecipeError(
            "judge.judges: each member is a section with the name of a judge and its options"
        )
    kind = find_plugin(prefloop.judges, str(name), Judge, "judge")
    options = {key: option for key, option in value.items() if key != "name"}
    return build(kind, options, f"judge.judges ({name})")


def _named(judge: Judge) -> dict[str, Any]:
    return {"name": plugin_name(prefloop.judges, judge), **judge.model_dump(mode="json")}


_SECTION = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
Member = Annotated[
    Judge, BeforeValidator(_built), PlainSerializer(_named), WithJsonSchema(_SECTION)
]


class Ensemble(Judge):
    """Several judges, weighted; where one of them has no verdict, neither has the ensemble."""

    judges: tuple[Member, ...] = Field(min_length=2)
    """Sections like `judge` itself, each with a name and options."""
    weights: tuple[float, ...] | None = None
    """One positive weight a judge; null weighs them equally."""
    combine: Literal["sum", "vote"] = "sum"
    """sum: weighted mean of the scores, so mind their scales. vote: weighted share of opponents beaten, ties half."""

    @model_validator(mode="after")
    def _weights_fit(self) -> Ensemble:
        given = self.weights
        if given is not None and (len(given) != len(self.judges) or not all(w > 0 for w in given)):
            raise ValueError(
                f"judge.weights must hold {len(self.judges)} positive numbers, one a judge"
            )
        return self

    @property
    def needs_target(self) -> bool:
        """If one of them does."""
        return any(judge.needs_target for judge in self.judges)

    @property
    def needs_policy(self) -> bool:
        """If one of them does."""
        return any(judge.needs_policy for judge in self.judges)

    @property
    def needs_moved_policy(self) -> bool:
        """If one of them does: where one has no verdict, none has the ensemble."""
        return any(judge.needs_moved_policy for judge in self.judges)

    @property
    def sources(self) -> dict[str, str]:
        """All that its members load."""
        return {
            f"judges[{n}].{option}": source
            for n, judge in enumerate(self.judges)
            for option, source in judge.sources.items()
        }

    def check(self) -> None:
        """Check every member."""
        for judge in self.judges:
            judge.check()

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Open every member."""
        given = self.weights or (1.0,) * len(self.judges)
        return _OpenEnsemble(
            tuple(judge.open(policy, prompts, initial) for judge in self.judges),
            tuple(weight / math.fsum(given) for weight in given),
            self.combine,
        )


@dataclass(frozen=True)
class _OpenEnsemble:
    judges: tuple[OpenJudge, ...]
    shares: tuple[float, ...]
    combine: str

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        columns = [judge.score(prompts, groups) for judge in self.judges]
        return [self._group([column[n] for column in columns]) for n in range(len(groups))]

    def _group(self, verdicts: Sequence[Verdict]) -> Verdict:
        scores: list[tuple[float, ...]] = []
        for verdict in verdicts:
            if isinstance(verdict, NoVerdict):
                return verdict
            scores.append(verdict if self.combine == "sum" else beaten(verdict))
        if not all(scores):
            return ALONE
        return finite(
            [
                math.fsum(share * score for share, score in zip(self.shares, column, strict=True))
                for column in zip(*scores, strict=True)
            ]
        )


def beaten(scores: Sequence[float]) -> tuple[float, ...]:
    """Share of the other answers that each one scores above, ties one half; empty where there are no others."""
    others = len(scores) - 1
    if others < 1:
        return ()
    return tuple(
        (sum(s > t for t in scores) + (sum(s == t for t in scores) - 1) / 2) / others
        for s in scores
    )
