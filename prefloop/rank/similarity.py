"""chrF of a response to the prompt's target: a judge that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from sacrebleu.metrics.chrf import CHRF

from prefloop.rank import Judge, NoVerdict, OpenJudge, Verdict
from prefloop.records import Prompt

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet


class Similarity(Judge):
    """Character n-gram F-score to the target, 0 to 100 (chrF, Popovic 2015; sacrebleu's settings)."""

    needs_target: ClassVar[bool] = True

    word_order: int = Field(default=0, ge=0)
    """Longest word n-gram that counts beside the characters'; 0 is chrF, 2 is chrF++."""

    def open(self, policy: Engine | None, prompts: PromptSet) -> OpenJudge:
        """Needs neither the policy nor the prompts."""
        return _OpenSimilarity(CHRF(word_order=self.word_order))


@dataclass(frozen=True)
class _OpenSimilarity:
    metric: CHRF

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return [self._group(p, group) for p, group in zip(prompts, groups, strict=True)]

    def _group(self, prompt: Prompt, group: Sequence[str]) -> Verdict:
        target = prompt.target or ""
        if not target.strip():
            return NoVerdict("no target")
        if not all(text.strip() for text in group):
            return NoVerdict("empty response")
        return tuple(float(self.metric.sentence_score(text, [target]).score) for text in group)
