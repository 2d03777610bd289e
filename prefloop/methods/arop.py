"""AROP: the policy refines its own answer, adds one subtle flaw to it, and learns to prefer the former by a margin.

Source: "Adversarial Reflection-Optimized Preference". Section 4.2's three phases are two drafts, `_refine` and
`_flaw`; section 4.3's loss is -log sigma(R - M) against the initial policy; Algorithm 1 generates
with the current policy, so optimiser and learning-rate schedule run through all rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from prefloop.config import Options
from prefloop.data.text_distance import edit_share, fold_whitespace
from prefloop.generate.engine import MIN_MASS, among
from prefloop.generate.infill import infill_flaws
from prefloop.judges.self_judge import NO_RATING, RATINGS, expected_rating
from prefloop.methods import (
    Actors,
    Layout,
    Method,
    further,
    sampled_tokens,
    unfinished,
    unranked,
)
from prefloop.methods._gates import Gates
from prefloop.records import Candidates, Pair, Prompt, Reject, Request, Response, derive_seed

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput

_FINAL = "Final answer:"
_Said = tuple[Request, Response]


class Margin(Options):
    """AROP's M, one number per pair, at least 0 (docs/methods/arop.md, "The margin")."""

    kind: Literal["fixed", "confidence", "severity", "edit", "axes"] = "confidence"
    """How M is computed. Section 4.3: fixed, or from the model's own confidence; 6.2: by axes."""
    m: float = Field(default=1.0, ge=0.0)
    """fixed: M itself; confidence, edit: factor of the measured difference."""
    m_min: float = Field(default=0.0, ge=0.0)
    """severity, axes: M of a flaw rated 1."""
    m_max: float = Field(default=2.0, ge=0.0)
    """severity, axes: M of a flaw rated 5."""
    min_mass: float = Field(default=MIN_MASS, ge=0.0, le=1.0)
    """severity, axes: no pair where the model gives all ratings together less than this probability."""
    axes: dict[str, Annotated[float, Field(ge=0.0)]] = Field(
        default={"helpfulness": 1 / 3, "harmlessness": 1 / 3, "honesty": 1 / 3}
    )
    """axes: weight of each axis (section 6.2, V-AROP)."""

    def rated_axes(self) -> tuple[str | None, ...]:
        """The ratings to ask the policy for: none, (None,) for one of the whole flaw, or one per axis."""
        if self.kind == "axes":
            return tuple(self.axes)
        return (None,) if self.kind == "severity" else ()

    def of(self, chosen: str, rejected: str, ratings: dict[str, float]) -> float:
        """M of one pair from its texts and ratings."""
        match self.kind:
            case "fixed":
                return self.m
            case "confidence":
                gap = ratings["confidence_refined"] - ratings["confidence_flawed"]
                return self.m * min(max(gap, 0.0), 1.0)
            case "edit":
                return self.m * edit_share(chosen, rejected)
            case "severity":
                return self._of_rating(ratings["severity"])
            case "axes":
                return sum(
                    w * self._of_rating(ratings[f"severity_{a}"]) for a, w in self.axes.items()
                )

    def _of_rating(self, rating: float) -> float:
        return self.m_min + (self.m_max - self.m_min) * (rating - 1) / 4


class AROP(Method):
    """Adversarial Reflection-Optimized Preference: refine, add one subtle flaw, learn the difference by a margin."""

    answer: ClassVar[str] = "draft_a"
    roles: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    defaults: ClassVar = {
        "loop": {"rounds": 20, "prompts_per_round": 32, "carry_optimizer": True},
        "train": {"epochs": 1, "batch_size": 32},
    }

    beta: float = Field(default=0.1, gt=0.0)
    """Inverse temperature of the implicit reward difference R (section 3.1)."""
    refine: bool = True
    """False: the raw draft A is the chosen answer (ablation "w/o SCR" of Table 2)."""
    flaw: Literal["prompt", "infill"] = "prompt"
    """Ask for a subtle flaw (section 4.2), or replace one word by a less likely one (our addition)."""
    layout: Layout = "single"
    """Refinement and flaw are asked for in single messages that quote the answers, or in further turns after candidate A (our addition)."""
    margin: Margin = Margin()
    """M of section 4.3; kind fixed with m 0 is the ablation "w/o Margin" of Table 2."""
    gates: Gates = Gates(max_edit_share=0.5, max_length_ratio=2.0)
    """The two limits keep flaws subtle, as the method assumes."""

    @property
    def asks_logprobs(self) -> str | None:
        """Confidences, severities and infilled words are read from the policy's token probabilities."""
        if self.margin.kind == "confidence" or self.margin.rated_axes():
            return f"margin.kind: {self.margin.kind}"
        return "flaw: infill" if self.flaw == "infill" else None

    def generate(self, prompts: Sequence[Prompt], actors: Actors) -> Iterator[Candidates | Reject]:
        """Drafts A and B, the refined answer and its flawed copy for each prompt."""
        asks = [Request(messages=prompt.messages) for prompt in prompts]
        drafts = self._sample(asks, actors, "draft_a")
        found = [{"draft_a": draft} for draft in drafts]
        said = list(zip(asks, drafts, strict=True))
        if self.refine:
            for responses, draft in zip(found, self._sample(asks, actors, "draft_b"), strict=True):
                responses["draft_b"] = draft
            said = self._refine(prompts, asks, found, actors)
        else:
            found = [{**responses, "refined": responses["draft_a"]} for responses in found]
        flaws = self._flaw(prompts, said, [r["refined"] for r in found], actors)
        if self.flaw == "infill":
            found = [{**r, "refined": _without_thought(r["refined"])} for r in found]
        for prompt, responses, flawed in zip(prompts, found, flaws, strict=True):
            if flawed is None:
                yield Reject(
                    prompt_id=prompt.id,
                    stage="generate",
                    reason="no word to flaw",
                    detail=responses["refined"].text,
                )
            else:
                yield Candidates(prompt=prompt, responses={**responses, "flawed": flawed})

    def _sample(self, asks: list[Request], actors: Actors, phase: str) -> list[Response]:
        seed = derive_seed(actors.seed, phase)
        return actors.policy.sample(asks, self.sampling, seed=seed, label=phase)

    def _ask(self, actors: Actors, role: str, said: _Said, **values: str) -> Request:
        """The request for `role`: a single message, or a further turn after a conversation and its answer."""
        if self.layout == "single":
            return Request(messages=actors.prompts.render(role, **values))
        asked, answer = said
        return further(asked, answer.text, actors.prompts.render(f"{role}_turn", **values))

    def _refine(
        self,
        prompts: Sequence[Prompt],
        asks: list[Request],
        found: list[dict[str, Response]],
        actors: Actors,
    ) -> list[_Said]:
        """Structured critique and refinement: analyse A and B, write one better answer. Returns requests and answers."""
        refine_asks = [
            self._ask(
                actors,
                "refine",
                (ask, r["draft_a"]),
                question=prompt.text,
                answer_a=r["draft_a"].text,
                answer_b=r["draft_b"].text,
            )
            for prompt, ask, r in zip(prompts, asks, found, strict=True)
        ]
        refined = self._sample(refine_asks, actors, "refined")
        # Looked up in the template without values, as a draft may contain "Final answer:" too.
        nothing = (Request(messages=()), Response(text=""))
        bare = self._ask(actors, "refine", nothing, question="", answer_a="", answer_b="")
        splits = _FINAL in bare.messages[-1].content
        for responses, response in zip(found, refined, strict=True):
            responses["refined"] = response
            if splits:
                # The analysis before the final answer is not part of y_w; without a final answer the response is
                # empty, which the gates reject. What is left was not sampled as an answer of its own, so it has
                # no tokens of its own.
                before, final, answer = response.text.rpartition(_FINAL)
                critique = before if final else answer
                responses["critique"] = response.model_copy(update={"text": critique.strip()})
                responses["refined"] = _as_text(response, answer.strip() if final else "")
        return list(zip(refine_asks, refined, strict=True))

    def _flaw(
        self,
        prompts: Sequence[Prompt],
        said: list[_Said],
        refined: list[Response],
        actors: Actors,
    ) -> list[Response | None]:
        """Max-margin rejection synthesis: one subtle flaw in the refined answer; None where infilling found no word."""
        if self.flaw == "infill":
            flaws = infill_flaws(
                actors.policy,
                [Request(messages=prompt.messages) for prompt in prompts],
                refined,
                self.sampling,
                seed=derive_seed(actors.seed, "flawed"),
            )
            # A copy that differs in one word ends as its original does.
            return [
                None if flaw is None else _as_text(response, flaw.text)
                for flaw, response in zip(flaws, refined, strict=True)
            ]
        prompted = [
            self._ask(actors, "flaw", before, question=prompt.text, answer=response.text)
            for prompt, before, response in zip(prompts, said, refined, strict=True)
        ]
        return [*self._sample(prompted, actors, "flawed")]

    def rank(self, groups: Sequence[Candidates], actors: Actors) -> Iterator[Candidates | Reject]:
        """Rate how far apart the two answers are, for the margin; their order is given."""
        ratings: list[dict[str, float]] = [{} for _ in groups]
        if self.margin.kind == "confidence":
            asks = [Request(messages=group.prompt.messages) for group in groups]
            for name in ("refined", "flawed"):
                scored = actors.policy.score(asks, [g.responses[name] for g in groups])
                for rating, score in zip(ratings, scored, strict=True):
                    rating[f"confidence_{name}"] = score.mean_logprob
        unrated: set[int] = set()
        for axis in self.margin.rated_axes():
            key = f"severity_{axis}" if axis else "severity"
            for n, value in enumerate(self._severity(groups, axis, actors)):
                if value is None:
                    unrated.add(n)
                else:
                    ratings[n][key] = value
        for n, group in enumerate(groups):
            if n in unrated:
                yield unranked(group, "no severity", NO_RATING)
            else:
                yield group.model_copy(update={"ratings": ratings[n]})

    def _severity(
        self, groups: Sequence[Candidates], axis: str | None, actors: Actors
    ) -> list[float | None]:
        """Expected ratings, 1 to 5, from the probabilities of the rating tokens; nothing is sampled.

        None where they have less than `margin.min_mass` together.
        """
        asks = [
            Request(
                messages=actors.prompts.render(
                    "severity",
                    question=group.prompt.text,
                    answer=group.responses["refined"].text,
                    flawed=group.responses["flawed"].text,
                    axis=axis,
                )
            )
            for group in groups
        ]
        rows = actors.policy.choose(asks, RATINGS)
        found = [among(row, self.margin.min_mass) for row in rows]
        return [None if row is None else expected_rating(row) for row in found]

    def pair(self, ranked: Iterable[Candidates], round: int) -> Iterator[Pair | Reject]:
        """Refined over flawed answer, with its margin, after the gates."""
        for group in ranked:
            reject = self.gates.reject(group, "refined", "flawed")
            if reject is not None:
                yield reject
                continue
            refined, flawed = group.responses["refined"], group.responses["flawed"]
            yield Pair(
                prompt_id=group.prompt.id,
                round=round,
                prompt=group.prompt.messages,
                chosen=refined.text,
                rejected=flawed.text,
                margin=self.margin.of(refined.text, flawed.text, group.ratings),
                ratings=group.ratings,
                unfinished=unfinished({"chosen": refined, "rejected": flawed}),
                token_ids=sampled_tokens({"chosen": refined, "rejected": flawed}),
                origin={"chosen": "refined" if self.refine else "draft_a", "rejected": "flawed"},
            )

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """-log sigma(beta (r(y_w) - r(y_l)) - M) of B pairs."""
        from prefloop.train import losses

        r_c, r_r = (logps.ratio(role) for role in self.roles)
        loss_B = losses.arop(r_c, r_r, logps.margin_B, beta=self.beta)
        r_c, r_r = r_c.detach(), r_r.detach()
        reward_B = self.beta * (r_c - r_r)
        metrics = {
            "reward_margin": reward_B,
            "real_reward": self.beta * r_c,
            "reward_chosen": self.beta * r_c,
            "reward_rejected": self.beta * r_r,
            "accuracy": (reward_B > 0).float(),
            "over_margin": (reward_B > logps.margin_B).float(),
            "M": logps.margin_B,
        }
        return losses.LossOutput(loss_B, metrics)

    def loss_at_start(self, pairs: Sequence[Pair]) -> float | None:
        """The mean of log(1 + e^M) over the pairs."""
        return sum(p.margin + math.log1p(math.exp(-p.margin)) for p in pairs) / len(pairs)

    def measures(self, ranked: Sequence[Candidates]) -> dict[str, float | None]:
        """How often refining leaves the draft unchanged, how much the flaws change, and the margins they get."""
        if not ranked:
            return {}
        texts = [{name: r.text for name, r in group.responses.items()} for group in ranked]
        same = [fold_whitespace(t["draft_a"]) == fold_whitespace(t["refined"]) for t in texts]
        shares = [edit_share(t["refined"], t["flawed"]) for t in texts]
        measures: dict[str, float | None] = {
            "identical_rate": fmean(same),
            "flaw_edit_share": fmean(shares),
        }
        if self.margin.kind != "fixed":
            measures["M"] = fmean(
                self.margin.of(t["refined"], t["flawed"], group.ratings)
                for t, group in zip(texts, ranked, strict=True)
            )
        if self.margin.kind == "confidence":
            gaps = [
                g.ratings["confidence_refined"] - g.ratings["confidence_flawed"] for g in ranked
            ]
            measures["flaw_unseen"] = fmean(gap <= 0 for gap in gaps)
        return measures


def _as_text(answer: Response, text: str) -> Response:
    """A text that nobody sampled, which ends as an answer does."""
    return Response(text=text, finish=answer.finish)


def _without_thought(answer: Response) -> Response:
    """What an infilled copy, which has no thought, is compared with: the pair must differ in the word alone."""
    return _as_text(answer, answer.text) if answer.reasoning else answer
