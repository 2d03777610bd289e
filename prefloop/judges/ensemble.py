"""Several judges combined into one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

import prefloop.judges
from prefloop.config import build, find_plugin, plugin_name
from prefloop.errors import RecipeError
from prefloop.judges import ALONE, Judge, NoVerdict, OpenJudge, Verdict, finite, score_responses
from prefloop.records import Prompt, Response

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial


def _build_member(value: object) -> Judge:
    """Build a member from its section of the recipe."""
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


def _dump_member(judge: Judge) -> dict[str, Any]:
    return {"name": plugin_name(prefloop.judges, judge), **judge.model_dump(mode="json")}


_SECTION = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
Member = Annotated[
    Judge, BeforeValidator(_build_member), PlainSerializer(_dump_member), WithJsonSchema(_SECTION)
]


class Ensemble(Judge):
    """Several judges, weighted; where one of them has no verdict, the ensemble has none either."""

    example: ClassVar = {
        "judges": [{"name": "similarity"}, {"name": "self_judge"}],
        "weights": [0.01, 1.0],
    }

    judges: tuple[Member, ...] = Field(min_length=2)
    """Sections like `judge` itself, each with a name and options."""
    weights: tuple[float, ...] | None = None
    """One positive weight per judge; null: equal weights."""
    combine: Literal["sum", "vote"] = "sum"
    """sum: weighted mean of the scores, so their scales matter. vote: weighted fraction of opponents beaten, ties half."""

    @model_validator(mode="after")
    def _weights_fit(self) -> Ensemble:
        weights = self.weights
        if weights is not None and (
            len(weights) != len(self.judges) or not all(weight > 0 for weight in weights)
        ):
            raise ValueError(
                f"judge.weights must hold {len(self.judges)} positive numbers, one a judge"
            )
        return self

    @property
    def needs_target(self) -> bool:
        """Whether any member does."""
        return any(judge.needs_target for judge in self.judges)

    @property
    def needs_policy(self) -> bool:
        """Whether any member does."""
        return any(judge.needs_policy for judge in self.judges)

    @property
    def needs_moved_policy(self) -> bool:
        """Whether any member does: without its verdict the ensemble has none."""
        return any(judge.needs_moved_policy for judge in self.judges)

    @property
    def sources(self) -> dict[str, str]:
        """The sources of all members."""
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
        weights = self.weights or (1.0,) * len(self.judges)
        return _OpenEnsemble(
            tuple(judge.open(policy, prompts, initial) for judge in self.judges),
            tuple(weight / math.fsum(weights) for weight in weights),
            self.combine,
        )


@dataclass(frozen=True)
class _OpenEnsemble:
    judges: tuple[OpenJudge, ...]
    weights: tuple[float, ...]
    combine: str

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return self.score_sampled(prompts, [[Response(text=text) for text in g] for g in groups])

    def score_sampled(
        self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Response]]
    ) -> list[Verdict]:
        verdicts_by_judge = [score_responses(judge, prompts, groups) for judge in self.judges]
        return [
            self._group([verdicts[n] for verdicts in verdicts_by_judge]) for n in range(len(groups))
        ]

    def _group(self, verdicts: Sequence[Verdict]) -> Verdict:
        scores: list[tuple[float, ...]] = []
        for verdict in verdicts:
            if isinstance(verdict, NoVerdict):
                return verdict
            scores.append(verdict if self.combine == "sum" else fraction_beaten(verdict))
        if not all(scores):
            return ALONE
        return finite(
            [
                math.fsum(
                    weight * score for weight, score in zip(self.weights, column, strict=True)
                )
                for column in zip(*scores, strict=True)
            ]
        )


def fraction_beaten(scores: Sequence[float]) -> tuple[float, ...]:
    """For each answer the fraction of the others that it outscores, ties one half; () where there are no others."""
    others = len(scores) - 1
    if others < 1:
        return ()
    return tuple(
        (sum(own > other for other in scores) + (sum(own == other for other in scores) - 1) / 2)
        / others
        for own in scores
    )
