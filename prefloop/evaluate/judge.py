"""The judge of an evaluation: named, or the runs' own; opened when a measure first needs it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import prefloop.judges
from prefloop.config import plugin_name
from prefloop.errors import DataError, RecipeError
from prefloop.evaluate.cache import digest, held_out_prompts
from prefloop.evaluate.judge_check import parse_judge
from prefloop.evaluate.subjects import Source, content_hash
from prefloop.generate.hf_engine import open_engine
from prefloop.generate.templates import PromptSet
from prefloop.judges import CachedJudge, Judge, OpenJudge
from prefloop.models.sources import quiet


class EvaluationJudge:
    """The judge of this evaluation, or none."""

    def __init__(self, judge: Judge | None, label: str | None, policy: str | None) -> None:
        """`label` is its name in the report; `policy` the model that it asks, None where it asks none."""
        self.judge = judge
        self.label = label
        self.policy = policy

    @classmethod
    def of(
        cls, text: str | None, policy: str | None, sources: Sequence[Source], prompts: str
    ) -> EvaluationJudge:
        """The judge that `text` names, or the one that the runs share. Raises PrefloopError.

        A judge that compares with targets needs `prompts`, the source of prompts, to have some.
        """
        if text is None:
            return cls._from_runs(sources, prompts)
        label, judge = parse_judge(text)
        if judge.needs_policy and policy is None:
            raise RecipeError(
                f"judge {label} asks the policy, and subjects are not to judge themselves; name the model that it "
                "asks with --policy"
            )
        judge.check()
        if judge.needs_target and (count := _count_without_target(prompts)):
            raise DataError(
                f"judge {label} compares with responses, and {count} prompts of {prompts} have none; name prompts that "
                "have, or another judge"
            )
        asks = f", asking {policy}" * (judge.needs_policy)
        return cls(judge, f"{label}{asks}", policy if judge.needs_policy else None)

    @classmethod
    def _from_runs(cls, sources: Sequence[Source], prompts: str) -> EvaluationJudge:
        """The judge that all runs' recipes have in common, else none."""
        recipes = [recipe for source in sources if (recipe := source.recipe) is not None]
        judges = [recipe.answers_judge for recipe in recipes]
        first = judges[0] if judges else None
        if first is None or first.needs_policy or any(judge != first for judge in judges):
            return cls(None, None, None)
        if first.needs_target and _count_without_target(prompts):
            return cls(None, None, None)
        return cls(first, f"{plugin_name(prefloop.judges, first)}, the run's own", None)

    @property
    def key(self) -> str:
        """A hash of what decides its verdicts: name, options, and the files or models that these name."""
        if self.judge is None:
            return ""
        sources = [*self.judge.sources.values(), *([self.policy] if self.policy else [])]
        source_hashes = [
            content_hash(Path(source).expanduser())
            if Path(source).expanduser().exists()
            else source
            for source in sources
        ]
        return digest(
            plugin_name(prefloop.judges, self.judge), self.judge.model_dump_json(), source_hashes
        )

    @cached_property
    def _open(self) -> OpenJudge:
        assert self.judge is not None
        with quiet():
            engine: Any = open_engine(self.policy) if self.policy else None
            return CachedJudge(self.judge.open(engine, PromptSet("compact")))

    @property
    def opened(self) -> OpenJudge | None:
        """The open judge, loaded on first use; None where there is none."""
        return None if self.judge is None else LazyJudge(self)


def _count_without_target(prompts: str) -> int:
    return sum(prompt.target is None for prompt in held_out_prompts(prompts, None))


class LazyJudge:
    """Loads the evaluation's judge at the first call of `score`."""

    def __init__(self, judge: EvaluationJudge) -> None:
        self._evaluation_judge = judge

    def score(self, prompts: Any, groups: Any) -> Any:
        return self._evaluation_judge._open.score(prompts, groups)
