"""Signs of collapse in held-out answers: their length, their variety (distinct-2), whether they end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
from pydantic import Field

from prefloop.evaluate.answers import distinct_2
from prefloop.evaluate.cache import answers_of, held_out_prompts
from prefloop.evaluate.measures import Better, Item, Measure, Outcome, Subject, Suite
from prefloop.evaluate.stats import Estimate, bootstrap_mean, wilson
from prefloop.records import Response, Sampling


class Health(Measure):
    """Length of answers, distinct-2, and the share of answers that end by themselves."""

    suites: ClassVar[tuple[Suite, ...]] = ("quick",)
    better: ClassVar[Mapping[str, Better]] = {
        "mean_length": "neither",
        "distinct_2": "higher",
        "stop_rate": "higher",
    }

    held_out: str | None = None
    """Source of the prompts; null: those of --data, else the run's held-out prompts."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first `limit` prompts; null: all."""
    sampling: Sampling = Sampling()
    """How answers are drawn."""
    chunk: int = Field(default=32, ge=1)
    """Prompts answered per cache file; a killed evaluation repeats at most one file."""

    def check(self) -> None:
        """DataError where there are no prompts."""
        held_out_prompts(self.held_out, self.limit)

    def run(self, subject: Subject) -> Outcome:
        """Sample answers, and compute the three measures."""
        prompts = held_out_prompts(self.held_out, self.limit)
        answers = answers_of(
            subject.engine,
            prompts,
            self.sampling,
            seed=subject.seed,
            folder=subject.answers or subject.folder,
            chunk=self.chunk,
        )
        lengths = [float(len(answer.token_ids)) for answer in answers]
        ended = [float(answer.finish == "stop") for answer in answers]
        estimates = {
            "mean_length": bootstrap_mean(lengths, seed=subject.seed),
            "distinct_2": distinct_2_estimate(answers),
            "stop_rate": wilson(int(sum(ended)), len(ended)),
        }
        return Outcome(
            estimates={
                name: estimate for name, estimate in estimates.items() if estimate is not None
            },
            items=tuple(
                Item(
                    id=prompt.id,
                    values={"mean_length": length, "stop_rate": stopped},
                    texts={"prompt": prompt.text, "answer": answer.text},
                )
                for prompt, answer, length, stopped in zip(
                    prompts, answers, lengths, ended, strict=True
                )
            ),
            facts={
                "prompts": len(prompts),
                "sampling": self.sampling.model_dump(mode="json"),
                "empty": sum(not answer.text.strip() for answer in answers),
            },
        )


def distinct_2_estimate(answers: Sequence[Response]) -> Estimate | None:
    """Distinct-2 of all answers together, with a 95 % jackknife interval; None where no answer has two words.

    A bootstrap would be wrong here: an answer drawn twice adds no new bigram. Source: Efron and Tibshirani
    (1993), chapter 11, leaving out one answer at a time. N answers.
    """
    value = distinct_2(answer.text for answer in answers)
    if value is None:
        return None
    counts_by_answer = [Counter(pairwise(answer.text.split())) for answer in answers]
    total_counts = Counter[tuple[str, str]]()
    for counts in counts_by_answer:  # `sum` would copy the total for each answer
        total_counts.update(counts)
    bigrams, distinct = total_counts.total(), len(total_counts)
    without_N = np.array(
        [
            (distinct - sum(total_counts[bigram] == n for bigram, n in counts.items()))
            / (bigrams - counts.total())
            for counts in counts_by_answer
            if counts.total() < bigrams
        ]
    )
    count = len(without_N)
    half = 0.0
    if count > 1:
        half = float(1.96 * np.sqrt((count - 1) * without_N.var()))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), len(answers))
