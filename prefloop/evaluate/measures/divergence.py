"""KL divergence of the policy from its initial model, on the policy's own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from prefloop.evaluate.cache import answers_of, cached_records, digest, held_out_prompts
from prefloop.evaluate.measures import Better, Item, Measure, Outcome, Subject, Suite
from prefloop.evaluate.stats import bootstrap_mean, ratio
from prefloop.records import Prompt, Request, Response, Sampling


class Divergence(Measure):
    """KL(pi || pi_initial) of answers to held-out prompts, in nats per answer and per token.

    The mean of log pi(y|x) - log pi_initial(y|x) over answers that the policy draws at temperature 1: an unbiased
    estimate of the divergence of answers up to `max_new_tokens` tokens. The estimate can be slightly negative.
    """

    suites: ClassVar[tuple[Suite, ...]] = ("quick",)
    better: ClassVar[Mapping[str, Better]] = {"kl_answer": "neither", "kl": "neither"}
    needs_initial: ClassVar[bool] = True

    held_out: str | None = None
    """Source of the prompts; null: those of --data, else the run's held-out prompts."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first `limit` prompts; null: all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer at most."""
    chunk: int = Field(default=32, ge=1)
    """Prompts answered per cache file; a killed evaluation repeats at most one file."""

    def check(self) -> None:
        """DataError where there are no prompts."""
        held_out_prompts(self.held_out, self.limit)

    def run(self, subject: Subject) -> Outcome:
        """Sample answers at temperature 1, and score them under both models."""
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

        key = digest([(prompt.messages, answer.text, answer.token_ids) for prompt, answer in rows])
        items = cached_records(subject.folder / key, rows, Item, work, chunk=self.chunk)
        sums = [item.values["kl_answer"] for item in items]
        sizes = [float(item.texts["tokens"]) for item in items]
        estimates = {
            "kl_answer": bootstrap_mean(sums, seed=subject.seed),
            "kl": ratio(sums, sizes, seed=subject.seed),
        }
        return Outcome(
            estimates={
                name: estimate for name, estimate in estimates.items() if estimate is not None
            },
            items=tuple(items),
            facts={"prompts": len(prompts), "sampling": sampling.model_dump(mode="json")},
        )


def _score(rows: Sequence[tuple[Prompt, Response]], subject: Subject) -> list[Item]:
    assert subject.initial is not None
    requests = [Request(messages=prompt.messages) for prompt, _ in rows]
    answers = [answer for _, answer in rows]
    policy_scores = subject.engine.score(requests, answers)
    initial_scores = subject.initial.score(requests, answers)
    items = []
    for (prompt, _), own, initial in zip(rows, policy_scores, initial_scores, strict=True):
        log_ratio = sum(own.logprobs) - sum(initial.logprobs)
        sampled = str(len(own.logprobs))
        items.append(Item(id=prompt.id, values={"kl_answer": log_ratio}, texts={"tokens": sampled}))
    return items
