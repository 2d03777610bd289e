"""SPA: a few labelled pairs first; then the policy labels its own answers by its implicit reward.

Source: Kim et al. 2025, "Spread Preference Annotation: Direct Preference Judgment for Efficient LLM
Alignment" (arXiv:2406.04412), section 4: DPO on the seed, expansion by the implicit reward, self-refinement
of uncertain labels, de-coupled noise detection. The schedule is that of the baseline in "Introspective
Adversarial Learning", section 4.2, which tells no number of epochs; one, as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from prefloop.judges import NoVerdict, score_responses
from prefloop.judges.implicit import Implicit
from prefloop.methods import Actors, Generator, Pairing, Reference, scored, unranked
from prefloop.methods._pair_method import PairMethod, best_over_worst, drafts, pair_metrics
from prefloop.records import Candidates, Pair, Prompt, Reject, as_tuple

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput

_CONFIDENCE = "confidence"
_Weight = Annotated[float, Field(ge=0.0)]
_Weights = Annotated[tuple[_Weight, ...], Field(min_length=1)]


class SPA(PairMethod):
    """Spread Preference Annotation: DPO on labelled seed pairs, then on pairs that the policy labels itself."""

    defaults: ClassVar = {
        "loop": {"rounds": 3},
        "train": {
            "epochs": 1,
            "lr": 5e-7,
            "optimizer": "adamw",
            "schedule": "cosine",
            "warmup": 0.1,
            "batch_size": 32,
        },
    }

    reference: Reference = "round_start"
    """The policy that labelled a round's pairs; labels themselves are always measured from the initial policy."""
    generator: Generator = "current"
    """The policy that generates drafts after the seed round: the one that labels them."""
    beta: float = Field(default=0.1, gt=0.0)
    """Inverse temperature, of the loss and of the implicit reward. IAL section 4.2: 0.1."""
    alpha: float = Field(default=0.1, ge=0.0, le=0.5)
    """Label smoothing of the least confident pairs. IAL section 4.2: 0.1."""
    least_confident: float = Field(default=10.0, ge=0.0, le=100.0)
    """The paper's K: per cent of a round's pairs whose labels are smoothed. IAL section 4.2: 10."""
    decoupling: Annotated[_Weight | _Weights, BeforeValidator(as_tuple)] = (0.5, 0.25, 0.125)
    """The paper's lambda, by round after the seed round: how far the detecting policy is extrapolated away from the initial one; 0 is the policy itself."""

    @model_validator(mode="after")
    def _labels_come_from_the_policy_itself(self) -> SPA:
        if self.generator != "current":
            raise ValueError(
                "method spa labels what the policy itself has written; set method.generator to "
                "current, or take method dpo with pairs: drafts"
            )
        return self

    def generate(self, prompts: Sequence[Prompt], actors: Actors) -> Iterator[Candidates | Reject]:
        """Round 0: the seed pairs, as `pairs` says. Later rounds: two drafts per prompt."""
        if actors.round <= 0:
            yield from super().generate(prompts, actors)
        else:
            yield from drafts(prompts, actors, self.sampling, 2)

    def rank(self, groups: Sequence[Candidates], actors: Actors) -> Iterator[Candidates | Reject]:
        """The implicit reward of each draft, and the de-coupled policy's confidence in their order."""
        if actors.round <= 0:
            yield from super().rank(groups, actors)
            return
        assert actors.beside_initial is not None
        judge = actors.beside_initial(Implicit(beta=self.beta))
        detector = actors.beside_initial(
            Implicit(beta=self.beta, decoupled=self._decoupling(actors.round))
        )
        ranked = list(scored(groups, judge))
        ordered = [group for group in ranked if isinstance(group, Candidates)]
        sure = iter(
            score_responses(
                detector,
                [group.prompt for group in ordered],
                [list(group.responses.values()) for group in ordered],
            )
        )
        for group in ranked:
            if isinstance(group, Reject):
                yield group
            elif isinstance(verdict := next(sure), NoVerdict):
                yield unranked(group, "no confidence", verdict)
            else:
                found = confidence(tuple(group.scores.values()), verdict)
                yield group.model_copy(update={"ratings": {_CONFIDENCE: found}})

    def _decoupling(self, round: int) -> float:
        if isinstance(self.decoupling, float):
            return self.decoupling
        return self.decoupling[min(round - 1, len(self.decoupling) - 1)]

    def pair(self, ranked: Iterable[Candidates], round: int) -> Iterator[Pair | Reject]:
        """As `pairing` does, where these are all groups of the round."""
        groups = list(ranked)
        yield from self.pairing(groups, round)(groups)

    def pairing(self, ranked: Iterable[Candidates], round: int) -> Pairing:
        """The draft of the higher implicit reward over the other; the round's least sure labels are smoothed."""
        sure = {
            pair.prompt_id: pair.ratings[_CONFIDENCE]
            for pair in (self._labelled(group, round) for group in ranked)
            if isinstance(pair, Pair) and pair.ratings
        }
        doubtful = frozenset(least(sure, self.least_confident))

        def smoothed(groups: Sequence[Candidates]) -> Iterator[Pair | Reject]:
            for group in groups:
                pair = self._labelled(group, round)
                if isinstance(pair, Pair) and pair.prompt_id in doubtful:
                    pair = pair.model_copy(update={"smoothing": self.alpha})
                yield pair

        return smoothed

    def _labelled(self, group: Candidates, round: int) -> Pair | Reject:
        """The group's pair with how sure its label is, where the policy gave it."""
        result = best_over_worst(group, self.gates, round)
        sure = group.ratings.get(_CONFIDENCE)
        if isinstance(result, Reject) or sure is None:
            return result
        return result.model_copy(update={"ratings": {_CONFIDENCE: sure}})

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """(1 - alpha) DPO + alpha DPO with swapped pairs, of B pairs."""
        import torch

        from prefloop.train import losses

        r_c, r_r = (logps.ratio(role) for role in self.roles)
        smoothing_B = torch.zeros_like(r_c) if logps.smoothing_B is None else logps.smoothing_B
        loss_B = losses.dpo_smoothed(r_c, r_r, smoothing_B, beta=self.beta)
        metrics = pair_metrics(r_c, r_r, self.beta) | {"smoothed": (smoothing_B > 0).float()}
        return losses.LossOutput(loss_B, metrics)

    def loss_at_start(self, pairs: Sequence[Pair]) -> float | None:
        """log 2, smoothed or not."""
        return math.log(2)

    def measures(self, ranked: Sequence[Candidates]) -> dict[str, float | None]:
        """The mean confidence of the policy in its own labels."""
        found = [g.ratings[_CONFIDENCE] for g in ranked if _CONFIDENCE in g.ratings]
        return {"label_confidence": sum(found) / len(found)} if found else {}


def confidence(labels: Sequence[float], detected: Sequence[float]) -> float:
    """P(the label is right): sigma of the detector's reward difference, better-labelled draft minus the other."""
    better = 0 if labels[0] > labels[1] else 1
    gap = detected[better] - detected[1 - better]
    return (1 + math.tanh(gap / 2)) / 2  # sigma, without overflow


def least(confidences: dict[str, float], per_cent: float) -> list[str]:
    """The names with the lowest confidence, `per_cent` % of all, rounded to the nearest number."""
    count = math.floor(len(confidences) * per_cent / 100 + 0.5)
    return sorted(confidences, key=confidences.__getitem__)[:count]
