"""ACS and pairwise accuracy: whether training moved the policy towards the better of two given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from prefloop.data.preferences import Preference, read_preferences
from prefloop.errors import DataError
from prefloop.evaluate.cache import cached_records, digest
from prefloop.evaluate.measures import Better, Item, Measure, Outcome, Subject, Suite
from prefloop.evaluate.questions import drawn
from prefloop.evaluate.stats import clustered_mean
from prefloop.evaluate.win_rates import points
from prefloop.records import Request, Response


class Preferences(Measure):
    """ACS, the mean implicit reward margin on given pairs, and the proportion of pairs where it is above 0.

    R = beta (r(chosen) - r(rejected)), r(y) = log pi(y|x) - log pi_initial(y|x) summed over the answer's
    tokens, in nats (AROP section 5.1). It needs no judge and samples no answer. At the initial policy R is 0.
    """

    suites: ClassVar[tuple[Suite, ...]] = ("quick",)
    better: ClassVar[Mapping[str, Better]] = {"acs": "higher", "pair_accuracy": "higher"}
    needs_initial: ClassVar[bool] = True

    data: str | None = None
    """Labelled pairs that were not trained on, as `prefloop judge check` reads them; ties are left out."""
    limit: int | None = Field(default=None, ge=1)
    """Number of pairs, drawn at random by seed `draw`; null: all."""
    draw: int = 0
    """Seed of that draw; not the evaluation's, so that all subjects meet the same pairs."""
    beta: float = Field(default=0.1, gt=0.0)
    """Inverse temperature of the implicit reward."""
    chunk: int = Field(default=32, ge=1)
    """Pairs scored per cache file; a killed evaluation repeats at most one file."""

    def check(self) -> None:
        """DataError where no pairs are named, or the file holds none."""
        self._pairs()

    def run(self, subject: Subject) -> Outcome:
        """Score both answers of each pair under the policy and its initial model."""
        assert subject.initial is not None
        pairs = self._pairs()
        key = digest([(pair.key, pair.chosen, pair.rejected) for pair in pairs], self.beta)

        def work(part: Sequence[Preference], number: int) -> list[Item]:
            return self._score(part, subject)

        items = cached_records(subject.folder / key, pairs, Item, work, chunk=self.chunk)
        clusters = [item.cluster for item in items]
        estimates = {
            metric: clustered_mean(
                [item.values[metric] for item in items], clusters, seed=subject.seed
            )
            for metric in ("acs", "pair_accuracy")
        }
        return Outcome(
            estimates={
                name: estimate for name, estimate in estimates.items() if estimate is not None
            },
            items=tuple(items),
            facts={"pairs": len(pairs), "beta": self.beta, "prompts": len(set(clusters))},
        )

    def _pairs(self) -> list[Preference]:
        if self.data is None:
            raise DataError(
                "it has no pairs of its own: name a file of labelled pairs with --set preferences.data=FILE"
            )
        pairs = [pair for pair in read_preferences(self.data).pairs if not pair.tie]
        if not pairs:
            raise DataError(f"{self.data} holds ties only; name a file of pairs with a better one")
        return drawn(pairs, self.limit, self.draw, "preferences")

    def _score(self, pairs: Sequence[Preference], subject: Subject) -> list[Item]:
        assert subject.initial is not None
        requests = [Request(messages=pair.messages) for pair in pairs] * 2
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        answers = [Response(text=text) for text in texts]
        policy_logps = [sum(scored.logprobs) for scored in subject.engine.score(requests, answers)]
        initial_logps = [
            sum(scored.logprobs) for scored in subject.initial.score(requests, answers)
        ]
        log_ratios = [
            policy - initial for policy, initial in zip(policy_logps, initial_logps, strict=True)
        ]
        items = []
        for index, pair in enumerate(pairs):
            reward = self.beta * (log_ratios[index] - log_ratios[index + len(pairs)])
            items.append(
                Item(
                    id=pair.id,
                    group=pair.source,
                    cluster=pair.key,
                    values={"acs": reward, "pair_accuracy": points(reward, 0.0)},
                )
            )
        return items
