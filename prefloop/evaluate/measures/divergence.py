"""How far the policy is from the model that it started from, on its own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from prefloop.evaluate.cache import answers_of, cached_records, digest, held_out_prompts
from prefloop.evaluate.measures import Better, Item, Measure, Outcome, Subject, Suite
from prefloop.evaluate.stats import bootstrap_mean, ratio
from prefloop.records import Prompt, Request, Response, Sampling


class Divergence(Measure):
    """KL(pi || pi_initial) of answers to held-out prompts, in nats an answer and nats a token.

    The mean of log pi(y|x) - log pi_initial(y|x) over answers that the policy draws at temperature 1: an unbiased
    estimate of the divergence of answers up to `max_new_tokens` tokens. It may come out slightly negative.
    """

    suites: ClassVar[tuple[Suite, ...]] = ("quick",)
    better: ClassVar[Mapping[str, Better]] = {"kl_answer": "neither", "kl": "neither"}
    needs_initial: ClassVar[bool] = True

    held_out: str | None = None
    """Source of the prompts; null takes those of --data, or of the run."""
    limit: int | None = Field(default=None, ge=1)
    """The first so many prompts; null: all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer at most."""
    chunk: int = Field(default=32, ge=1)
    """Prompts answered at a time; what a kill can cost."""

    def check(self) -> None:
        """DataError where there are no prompts."""
        held_out_prompts(self.held_out, self.limit)

    def run(self, subject: Subject) -> Outcome:
        """Answer at temperature 1, and score the answers under both models."""
        prompts = held_out_prompts(self.held_out, self.limit)
        sampling = Sampling(temperature=1.0, max_new_tokens=self.max_new_tokens)
        answers = answers_of(
            subject.engine,
            prompts,
            sampling,
            seed=subject.seed,
            folder=subject.answers or subject.folder,
            chunk=self.chunk,
        )
        rows = list(zip(prompts, answers, strict=True))

        def work(part: Sequence[tuple[Prompt, Response]], number: int) -> list[Item]:
            return _score(part, subject)

        asked = digest(
            [(prompt.messages, answer.text, answer.token_ids) for prompt, answer in rows]
        )
        items = cached_records(subject.folder / asked, rows, Item, work, chunk=self.chunk)
        sums = [item.values["kl_answer"] for item in items]
        sizes = [float(item.texts["tokens"]) for item in items]
        estimates = {
            "kl_answer": bootstrap_mean(sums, seed=subject.seed),
            "kl": ratio(sums, sizes, seed=subject.seed),
        }
        return Outcome(
            estimates={name: found for name, found in estimates.items() if found is not None},
            items=tuple(items),
            facts={"prompts": len(prompts), "sampling": sampling.model_dump(mode="json")},
        )


def _score(rows: Sequence[tuple[Prompt, Response]], subject: Subject) -> list[Item]:
    assert subject.initial is not None
    asks = [Request(messages=prompt.messages) for prompt, _ in rows]
    answers = [answer for _, answer in rows]
    now, before = subject.engine.score(asks, answers), subject.initial.score(asks, answers)
    items = []
    for (prompt, _), mine, theirs in zip(rows, now, before, strict=True):
        gap, drawn = sum(mine.logprobs) - sum(theirs.logprobs), len(mine.logprobs)
        items.append(Item(id=prompt.id, values={"kl_answer": gap}, texts={"tokens": str(drawn)}))
    return items
