"""Similarity of a response to the prompt's target: chrF, or the cosine of sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from prefloop.judges import EMPTY, NO_TARGET, Judge, NoVerdict, OpenJudge, Verdict, finite
from prefloop.records import Prompt

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF

    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial
    from prefloop.models.embedding import Embedder

TOO_LONG = NoVerdict("longer than the embedding model's window")


class Similarity(Judge):
    """Similarity to the target: character n-gram F-score, 0 to 100, or with `model` a cosine, -1 to 1.

    chrF is Popovic 2015 with sacrebleu's settings. The cosine is that of mean-pooled token embeddings, as
    sentence-transformers makes them.
    """

    word_order: int = Field(default=0, ge=0)
    """chrF: longest word n-gram that counts beside the characters'; 0 is chrF, 2 is chrF++."""
    model: str | None = None
    """Sentence embedding model, a folder, Hub id or "embedded:minilm"; null compares by chrF."""

    @model_validator(mode="after")
    def _one_measure(self) -> Similarity:
        if self.model is not None and self.word_order:
            raise ValueError("judge.word_order is chrF's and has no effect with judge.model")
        return self

    @property
    def needs_target(self) -> bool:
        """Always: responses are compared with the target."""
        return True

    @property
    def sources(self) -> dict[str, str]:
        """The embedding model, if any."""
        return {} if self.model is None else {"model": self.model}

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Load the embedding model, if any. Raises ModelError."""
        if self.model is None:
            from sacrebleu.metrics.chrf import CHRF

            return _OpenChrf(CHRF(word_order=self.word_order))
        from prefloop.models.embedding import Embedder

        return _OpenCosine(Embedder(self.model))


def _no_verdict(prompt: Prompt, group: Sequence[str]) -> NoVerdict | None:
    if not (prompt.target or "").strip():
        return NO_TARGET
    return None if all(text.strip() for text in group) else EMPTY


@dataclass(frozen=True)
class _OpenChrf:
    metric: CHRF

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return [self._group(p, group) for p, group in zip(prompts, groups, strict=True)]

    def _group(self, prompt: Prompt, group: Sequence[str]) -> Verdict:
        failure = _no_verdict(prompt, group)
        if failure is not None:
            return failure
        target = prompt.target or ""
        return tuple(float(self.metric.sentence_score(text, [target]).score) for text in group)


@dataclass(frozen=True)
class _OpenCosine:
    embedder: Embedder

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        failures = [_no_verdict(p, group) for p, group in zip(prompts, groups, strict=True)]
        texts = [
            [] if failure else [prompt.target or "", *group]
            for prompt, group, failure in zip(prompts, groups, failures, strict=True)
        ]
        vectors = iter(self.embedder.embed([text for group in texts for text in group]))
        return [
            failure or _cosines([next(vectors) for _ in group])
            for failure, group in zip(failures, texts, strict=True)
        ]


def _cosines(vectors: Sequence[Sequence[float] | None]) -> Verdict:
    """Cosines of the first unit vector with the others; None stands for a text longer than the model's window."""
    embedded = [vector for vector in vectors if vector is not None]
    if len(embedded) < len(vectors):
        return TOO_LONG
    target, *answers = embedded
    return finite([sum(a * b for a, b in zip(target, answer, strict=True)) for answer in answers])
