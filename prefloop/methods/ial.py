"""IAL: Player, Advisor, Player again; a judge ranks; the loss is SPACP on target, better and worse answer.

Source: "Introspective Adversarial Learning". Algorithm 1, line by line: the Player answers (7), the Advisor,
which is the same model, suggests (8), the Player rewrites (9), the reward model ranks (10); the
loss is SPACP against the policy at the round's start, over this round's pairs and the previous one's (13).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from prefloop.data.text_distance import fold_whitespace
from prefloop.methods import Actors, Layout, Method, Reference, further, pair_of, scored
from prefloop.methods._gates import Gates
from prefloop.records import (
    Candidates,
    Pair,
    Prompt,
    Reject,
    Request,
    Response,
    Sampling,
    derive_seed,
)

if TYPE_CHECKING:
    from prefloop.train.losses import GroupLogps, LossOutput


class IAL(Method):
    """Introspective Adversarial Learning: Player, Advisor, Player again; SPACP on target, better, worse."""

    needs_target: ClassVar[bool] = True
    needs_judge: ClassVar[bool] = True
    answer: ClassVar[str] = "draft"
    roles: ClassVar[tuple[str, ...]] = ("target", "chosen", "rejected")
    defaults: ClassVar = {
        "loop": {"rounds": 3, "mix_previous": True, "carry_optimizer": False},
        "train": {
            "epochs": 2,
            "lr": 5e-7,
            "optimizer": "rmsprop",
            "schedule": "linear",
            "warmup": 0.1,
            "batch_size": 32,
        },
    }

    reference: Reference = "round_start"
    """Algorithm 1, line 13: the loss is measured from pi_t, the policy at the round's start."""
    eta: float = Field(default=0.1, gt=0.0)
    """Inverse temperature of the implicit reward. Section 4.1 writes it as beta = 0.1."""
    gamma: float = Field(default=5.0, ge=0.0)
    """Weight of the penalty that keeps the target likely; 0 gives SPAC. Section 4.1: 5.0."""
    lam: float = Field(default=1.0, ge=0.0)
    """Weight of the preference term. Section 4.1: lambda = 1.0."""
    objective: Literal["smoothed", "linear", "printed"] = "smoothed"
    """SPACP with both terms inside log-sigmoid (appendix B.6), as eq. 10, or eq. 12 to the letter."""
    penalty: Literal["relative", "nll"] = "relative"
    """P = max(0, -r(y_t)), or plain negative log-likelihood (the ablation of appendix C, Q2)."""
    advisor: bool = True
    """False: the second answer is a second draft, without advice."""
    layout: Layout = "single"
    """Advice and rewrite are asked for in single messages that quote what was said (appendix B.6), or in further turns of the conversation (our addition)."""
    copy_draft: bool = False
    """Both answers are the draft: the ablation of identical responses (appendix B.4)."""
    gates: Gates = Gates(identical=False, meta_talk=False)
    """The target is preferred to both answers, so flawed ones are useful and pass by default."""
    advice: Sampling = Sampling(max_new_tokens=128)
    """Sampling of the Advisor's suggestion."""

    def generate(self, prompts: Sequence[Prompt], actors: Actors) -> Iterator[Candidates | Reject]:
        """Draft, suggestion and rewrite for each prompt."""
        asks = [Request(messages=prompt.messages) for prompt in prompts]
        drafts = actors.policy.sample(
            asks, self.sampling, seed=derive_seed(actors.seed, "draft"), label="player"
        )
        found = [{"draft": draft} for draft in drafts]
        if self.copy_draft:
            for responses in found:
                responses["rewrite"] = responses["draft"]
        elif self.advisor:
            self._advise(prompts, found, actors)
        else:
            again = actors.policy.sample(
                asks, self.sampling, seed=derive_seed(actors.seed, "rewrite"), label="player again"
            )
            for responses, second in zip(found, again, strict=True):
                responses["rewrite"] = second
        for prompt, responses in zip(prompts, found, strict=True):
            yield Candidates(prompt=prompt, responses=responses)

    def _advise(
        self, prompts: Sequence[Prompt], found: list[dict[str, Response]], actors: Actors
    ) -> None:
        """Add the Advisor's suggestion and the Player's rewrite to each prompt's responses."""
        drafts = [Request(messages=prompt.messages) for prompt in prompts]
        advise = [
            self._ask(
                actors, "advisor", ask, r["draft"].text, question=p.text, answer=r["draft"].text
            )
            for p, ask, r in zip(prompts, drafts, found, strict=True)
        ]
        suggestions = actors.policy.sample(
            advise, self.advice, seed=derive_seed(actors.seed, "advice"), label="advisor"
        )
        rewrite_asks = [
            self._ask(
                actors,
                "rewrite",
                ask,
                s.text,
                question=p.text,
                answer=r["draft"].text,
                suggestion=s.text,
            )
            for p, ask, r, s in zip(prompts, advise, found, suggestions, strict=True)
        ]
        rewrites = actors.policy.sample(
            rewrite_asks,
            self.sampling,
            seed=derive_seed(actors.seed, "rewrite"),
            label="player again",
        )
        for responses, suggestion, rewrite in zip(found, suggestions, rewrites, strict=True):
            responses["advice"] = suggestion
            responses["rewrite"] = rewrite

    def _ask(self, actors: Actors, role: str, before: Request, said: str, **values: str) -> Request:
        """The request for `role`: a single message, or a further turn after `before` and its answer `said`."""
        if self.layout == "single":
            return Request(messages=actors.prompts.render(role, **values))
        return further(before, said, actors.prompts.render(f"{role}_turn", **values))

    def rank(self, groups: Sequence[Candidates], actors: Actors) -> Iterator[Candidates | Reject]:
        """The judge's scores of draft and rewrite (eq. 5)."""
        yield from scored(groups, actors.judge, ("draft", "rewrite"))

    def pair(self, ranked: Iterable[Candidates], round: int) -> Iterator[Pair | Reject]:
        """Triples (y_t, y+, y-): the draft wins if it scores above the rewrite, else the rewrite (eq. 5)."""
        for group in ranked:
            reject = self.gates.reject(group, "draft", "rewrite")
            if reject is not None:
                yield reject
                continue
            better = "draft" if group.scores["draft"] > group.scores["rewrite"] else "rewrite"
            worse = "rewrite" if better == "draft" else "draft"
            yield pair_of(group, better, worse, round)

    def loss(self, logps: GroupLogps, progress: float) -> LossOutput:
        """The SPACP loss of B triples."""
        from prefloop.train import losses

        r_t, r_c, r_r = (logps.ratio(role) for role in self.roles)
        nll = self.penalty == "nll"
        objectives = {
            "smoothed": losses.spacp,
            "linear": losses.spacp_linear,
            "printed": losses.spacp_printed,
        }
        loss_B = objectives[self.objective](
            r_t, r_c, r_r, eta=self.eta, gamma=0.0 if nll else self.gamma, lam=self.lam
        )
        if nll:
            loss_B = loss_B + losses.nll_penalty(
                logps.policy["target"], logps.lengths["target"], gamma=self.gamma
            )
        r_t, r_c, r_r = r_t.detach(), r_c.detach(), r_r.detach()
        metrics = {
            "margin": r_t - (r_c + r_r) / 2,
            "real_reward": self.eta * r_t,
            "penalty": losses.penalty(r_t),
            "reward_chosen": self.eta * r_c,
            "reward_rejected": self.eta * r_r,
            "accuracy": (r_t > r_c.maximum(r_r)).float(),
        }
        return losses.LossOutput(loss_B, metrics)

    def loss_at_start(self, pairs: Sequence[Pair]) -> float | None:
        """(1 + lambda) log 2 with both terms smoothed, lambda log 2 with a linear first term; None with `penalty: nll`."""
        if self.penalty == "nll":
            return None
        return (self.lam if self.objective == "linear" else 1 + self.lam) * math.log(2)

    def measures(self, ranked: Sequence[Candidates]) -> dict[str, float | None]:
        """R_i (appendix C, Table 6), identical rate (appendix B.4) and mean scores."""
        if not ranked:
            return {}
        scores = [group.scores for group in ranked]
        return {
            "R_i": sum(s["rewrite"] > s["draft"] for s in scores) / len(ranked),
            "identical_rate": sum(map(_identical, ranked)) / len(ranked),
            "score_rewrite": sum(s["rewrite"] for s in scores) / len(ranked),
        }


def _identical(group: Candidates) -> bool:
    texts = {fold_whitespace(group.responses[name].text) for name in ("draft", "rewrite")}
    return len(texts) == 1
