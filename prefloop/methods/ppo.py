"""PPO: one answer per prompt, scored by the judge; clipped policy steps on its tokens, with values and a KL penalty.

Source: "Introspective Adversarial Learning", appendix B.2, for the values (AROP's baseline RLAIF-PPO gives none);
Ziegler et al. 2019 (arXiv:1909.08593) and Huang et al. 2024 (arXiv:2403.17031) for PPO on language models.
The judge is meant to be a reward model trained on the same pairs as the other methods: `prefloop reward train`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from prefloop.methods import Actors, Method, Trains, sampled_tokens, scored, unfinished
from prefloop.records import Candidates, Pair, Prompt, Reject, Request, Sampling, derive_seed

if TYPE_CHECKING:
    from prefloop.train.losses import LossOutput
    from prefloop.train.ppo import Memory, Rollout, Targets, TokenLogps

ANSWER = "answer"


class PPO(Method):
    """Proximal Policy Optimization: one answer per prompt, the judge's score as reward, clipped steps on tokens."""

    needs_judge: ClassVar[bool] = True
    trains: ClassVar[Trains] = "tokens"
    roles: ClassVar[tuple[str, ...]] = ("chosen",)
    defaults: ClassVar = {
        "loop": {"rounds": 100, "prompts_per_round": 64, "carry_optimizer": True},
        "train": {"epochs": 3, "lr": 5e-7, "optimizer": "adamw", "batch_size": 32},
        # Generating for held-out prompts adds nothing: their answers are measured anyway.
        "evaluate": {"introspection": False},
    }

    sampling: Sampling = Sampling(temperature=1.0)
    """How answers are drawn: on-policy, so temperature 1 without truncation."""
    ratio_clip: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Clip range of the ratio of new to old probability. IAL appendix B.2: 0.2."""
    value_clip: float | None = Field(default=0.2, gt=0.0)
    """Clip range of a value's change in one round; null: no clip. IAL appendix B.2: 0.2."""
    value_coef: float = Field(default=0.1, ge=0.0)
    """Weight of the value loss, whose gradient reaches the policy's layers too."""
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount factor per token."""
    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    """GAE's lambda: 0 relies on the values, 1 on the rewards."""
    whiten: bool = True
    """Scale the round's advantages to mean 0 and variance 1."""
    kl_coef: float = Field(default=0.02, ge=0.0)
    """Penalty on log π − log π_ref, at each token, in the reward. IAL appendix B.2: fixed at 0.02."""
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: after each round the coefficient is changed so that the divergence approaches `kl_target`."""
    kl_target: float = Field(default=6.0, gt=0.0)
    """Target divergence from the reference in nats per answer; only with kl_control adaptive."""
    kl_horizon: float = Field(default=10_000.0, gt=0.0)
    """Number of answers over which the coefficient can change by 20 %; only with kl_control adaptive."""
    normalize_reward: bool = True
    """Subtract the mean of all scores so far and divide by their standard deviation."""
    reward_clip: float | None = Field(default=5.0, gt=0.0)
    """Clip the reward, normalised or not, to this distance from 0; null: no clip."""
    cut_off_penalty: float = Field(default=1.0, ge=0.0)
    """Subtracted from the score, in the judge's units, where the answer was cut off by the length limit."""

    @model_validator(mode="after")
    def _its_answers_are_its_own(self) -> PPO:
        drawn = self.sampling.model_copy(update={"max_new_tokens": 1})
        if drawn != Sampling(temperature=1.0, max_new_tokens=1):
            raise ValueError(
                "ppo learns from what the policy itself draws: leave method.sampling at temperature 1, without "
                "top_p, top_k, min_p and stop (evaluate.sampling can differ)"
            )
        if self.generator != "current" or self.reference != "initial":
            raise ValueError(
                "ppo needs method.generator: current, since its answers must be the policy's own, and "
                "method.reference: initial, since from the round's start the divergence is 0"
            )
        return self

    def generate(self, prompts: Sequence[Prompt], actors: Actors) -> Iterator[Candidates | Reject]:
        """One answer to each prompt."""
        answers = actors.policy.sample(
            [Request(messages=prompt.messages) for prompt in prompts],
            self.sampling,
            seed=derive_seed(actors.seed, ANSWER),
            label="policy",
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            yield Candidates(prompt=prompt, responses={ANSWER: answer})

    def rank(self, groups: Sequence[Candidates], actors: Actors) -> Iterator[Candidates | Reject]:
        """The judge's score of each single answer."""
        yield from scored(groups, actors.judge, (ANSWER,))

    def pair(self, ranked: Iterable[Candidates], round: int) -> Iterator[Pair | Reject]:
        """An example per answer, with its score minus the penalty for being cut off."""
        for group in ranked:
            answer = group.responses[ANSWER]
            if not answer.text.strip():
                yield Reject(prompt_id=group.prompt.id, stage="pair", reason="empty answer")
                continue
            penalty = self.cut_off_penalty if answer.finish == "length" else 0.0
            yield Pair(
                prompt_id=group.prompt.id,
                round=round,
                prompt=group.prompt.messages,
                chosen=answer.text,
                rejected="",
                origin={"chosen": ANSWER},
                unfinished=unfinished({"chosen": answer}),
                token_ids=sampled_tokens({"chosen": answer}),
                scores={"chosen": group.scores[ANSWER] - penalty},
            )

    def first_memory(self) -> Memory:
        """The state before the first round: no scores, and the initial KL coefficient."""
        from prefloop.train.ppo import Memory

        return Memory(kl_coef=self.kl_coef)

    def targets(self, rollout: Rollout, memory: Memory) -> tuple[Targets, Memory]:
        """Advantages and returns of a round's N answers; the state with their scores and the next KL coefficient."""
        from prefloop.train import ppo

        mask_NT = rollout.mask_NT
        memory = memory.seeing(rollout.scores_N)
        rewards_N = rollout.scores_N
        if self.normalize_reward:
            rewards_N = memory.normalised(rewards_N)
        if self.reward_clip is not None:
            rewards_N = rewards_N.clamp(-self.reward_clip, self.reward_clip)
        rewards_NT = ppo.token_rewards(
            rewards_N, rollout.logps_NT, rollout.reference_NT, mask_NT, kl_coef=memory.kl_coef
        )
        advantages_NT = ppo.gae(
            rewards_NT, rollout.values_NT, mask_NT, gamma=self.gamma, lam=self.lam
        )
        returns_NT = advantages_NT + rollout.values_NT
        facts = {
            "explained_variance": ppo.explained_variance(rollout.values_NT, returns_NT, mask_NT),
            "kl_coef": memory.kl_coef,
        }
        if self.whiten:
            advantages_NT = ppo.whiten(advantages_NT, mask_NT)
        return ppo.Targets(advantages_NT, returns_NT, facts), self._adapted(rollout, memory)

    def _adapted(self, rollout: Rollout, memory: Memory) -> Memory:
        from prefloop.train import ppo

        if self.kl_control == "fixed":
            return memory
        apart_NT = ppo.log_ratio(rollout.logps_NT, rollout.reference_NT, rollout.mask_NT)
        coef = ppo.next_kl_coef(
            memory.kl_coef,
            apart_NT.sum(dim=1).mean().item(),
            len(apart_NT),
            target=self.kl_target,
            horizon=self.kl_horizon,
        )
        return ppo.Memory(coef, memory.count, memory.mean, memory.square)

    def token_loss(self, tokens: TokenLogps, progress: float) -> LossOutput:
        """Clipped policy loss plus `value_coef` times clipped value loss, summed over tokens, of B answers."""
        from prefloop.train import losses, ppo

        mask_BT = tokens.mask_BT
        policy_BT = ppo.policy_loss(
            tokens.policy_BT,
            tokens.old_policy_BT,
            tokens.advantages_BT,
            mask_BT,
            clip=self.ratio_clip,
        )
        value_BT = ppo.value_loss(
            tokens.values_BT,
            tokens.old_values_BT,
            tokens.returns_BT,
            mask_BT,
            clip=self.value_clip,
        )
        policy_B = policy_BT.sum(dim=1) / tokens.mean_length
        value_B = value_BT.sum(dim=1) / tokens.mean_length
        metrics = {"policy_loss": policy_B.detach(), "value_loss": value_B.detach()}
        return losses.LossOutput(
            policy_B + self.value_coef * value_B,
            metrics | ppo.token_metrics(tokens, clip=self.ratio_clip),
        )
