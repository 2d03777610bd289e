"""PPO on tokens as pure functions: rewards, advantages, clipped losses, and the state carried between rounds.

Sources: Schulman et al. 2017 (arXiv:1707.06347) for the losses, Schulman et al. 2015 (arXiv:1506.02438) for GAE,
Ziegler et al. 2019 (arXiv:1909.08593) for PPO on language models, whose details Huang et al. 2024
(arXiv:2403.17031) list.

A token is an action: position t holds the log-prob of the answer's token t, and the value of the state before
it. Answers are right-padded; `mask` is True on their tokens, end-of-turn included, and never on a prompt.
Values where it is False have no influence on results and gradients, as long as they are finite.

Shapes: B answers of a micro-batch, N answers of a round, T tokens of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prefloop.train.losses import LossOutput

# exp(20) is finite and far beyond any clip: one outlier token must not make the whole batch infinite.
_MAX_LOG_RATIO = 20.0
_EPSILON = 1e-8


@dataclass(frozen=True)
class Rollout:
    """A round's answers with their log-probs and values before the round's first step."""

    logps_NT: Tensor
    """Log-probs in nats under the policy that sampled the answers."""
    reference_NT: Tensor
    """Log-probs in nats under the reference."""
    values_NT: Tensor
    mask_NT: Tensor
    scores_N: Tensor
    """The judge's scores, minus the method's penalties."""


class Targets(NamedTuple):
    """Advantages and returns of a round's answers, fixed before its first step."""

    advantages_NT: Tensor
    returns_NT: Tensor
    """Targets of the value head."""
    facts: Mapping[str, float]
    """Values of the whole round for the log."""


@dataclass(frozen=True)
class TokenLogps:
    """The input of a method's token loss for B answers; `policy_BT` and `values_BT` have gradients.

    The others are fixed before the round's first step.
    """

    policy_BT: Tensor
    values_BT: Tensor
    old_policy_BT: Tensor
    old_values_BT: Tensor
    reference_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor
    mask_BT: Tensor
    scores_B: Tensor
    mean_length: float
    """Mean tokens of the round's answers: losses are sums over tokens divided by it, so tokens weigh equally."""


@dataclass(frozen=True)
class Memory:
    """State carried from round to round beside the weights: KL coefficient and running moments of the scores."""

    kl_coef: float
    count: float = 0.0
    """Scores seen so far, in this and earlier rounds."""
    mean: float = 0.0
    square: float = 0.0
    """Sum of the squared distances of these scores from their mean."""

    def seeing(self, scores_N: Tensor) -> Memory:
        """The state updated by N more scores (mean and variance as in Chan et al. 1979)."""
        new_scores_N = scores_N.double()
        count = self.count + len(new_scores_N)
        shift = new_scores_N.mean().item() - self.mean
        new_square = (new_scores_N - new_scores_N.mean()).square().sum().item()
        return Memory(
            kl_coef=self.kl_coef,
            count=count,
            mean=self.mean + shift * len(new_scores_N) / count,
            square=self.square + new_square + shift**2 * self.count * len(new_scores_N) / count,
        )

    def normalised(self, scores_N: Tensor) -> Tensor:
        """The scores minus the running mean, divided by the running standard deviation."""
        spread = math.sqrt(self.square / max(self.count, 1.0))
        return (scores_N - self.mean) / (spread + _EPSILON)


class TokenMethod(Protocol):
    """The interface of a method that trains on tokens."""

    def first_memory(self) -> Memory:
        """The state before the first round."""
        ...

    def targets(self, rollout: Rollout, memory: Memory) -> tuple[Targets, Memory]:
        """The targets of a round's answers, and the state for the next round; pure."""
        ...

    def token_loss(self, tokens: TokenLogps, progress: float) -> LossOutput:
        """Per-answer loss of B answers; pure. `progress` in [0, 1] is the position in the round."""
        ...


def token_rewards(
    scores_N: Tensor, logps_NT: Tensor, reference_NT: Tensor, mask_NT: Tensor, *, kl_coef: float
) -> Tensor:
    """(N, T) rewards: −kl_coef·(log π − log π_ref) at each token, plus the score at the last (Ziegler et al., eq. 2)."""
    rewards_NT = torch.where(mask_NT, kl_coef * (reference_NT - logps_NT), 0.0)
    last_N1 = mask_NT.sum(dim=1, keepdim=True) - 1
    return rewards_NT.scatter_add(1, last_N1, scores_N[:, None].to(rewards_NT.dtype))


def gae(
    rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """(N, T) generalised advantages: A_t = δ_t + γλ·A_(t+1), δ_t = r_t + γ·V_(t+1) − V_t; the answer's end is worth 0.

    Schulman et al. 2015, eq. 16. The values' targets are A + V.
    """
    values_NT = torch.where(mask_NT, values_NT, 0.0)
    advantages_NT = torch.zeros_like(values_NT)
    next_value_N = next_advantage_N = torch.zeros_like(values_NT[:, 0])
    for t in reversed(range(values_NT.shape[1])):
        delta_N = rewards_NT[:, t] + gamma * next_value_N - values_NT[:, t]
        next_advantage_N = torch.where(mask_NT[:, t], delta_N + gamma * lam * next_advantage_N, 0.0)
        advantages_NT[:, t] = next_advantage_N
        next_value_N = values_NT[:, t]
    return advantages_NT


def whiten(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The values scaled to mean 0 and variance 1 over all tokens of the round; 0 elsewhere."""
    tokens = values_NT[mask_NT].double()
    # Epsilon: for equal values the spread is rounding error only, and would magnify that of the mean.
    spread = tokens.var(correction=0).sqrt() + _EPSILON
    return torch.where(mask_NT, (values_NT - tokens.mean()) / spread, 0.0)


def explained_variance(values_NT: Tensor, returns_NT: Tensor, mask_NT: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns): 1 is perfect, 0 no better than a constant; 0 if nothing varies."""
    returns, residuals = returns_NT[mask_NT], (returns_NT - values_NT)[mask_NT]
    spread = returns.var(correction=0).item()
    return 1 - residuals.var(correction=0).item() / spread if spread else 0.0


def log_ratio(logps_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log π − log π_old at the answer's tokens, clamped to ±20; 0 elsewhere."""
    difference_BT = torch.where(mask_BT, logps_BT - old_BT, 0.0)
    return difference_BT.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def policy_loss(
    logps_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, *, clip: float
) -> Tensor:
    """(B, T): −min(ρ·A, clip(ρ, 1 ± clip)·A) with ρ = π / π_old (Schulman et al. 2017, eq. 7)."""
    ratio_BT = log_ratio(logps_BT, old_BT, mask_BT).exp()
    clipped_BT = ratio_BT.clamp(1 - clip, 1 + clip)
    loss_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    return torch.where(mask_BT, loss_BT, 0.0)


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float | None,
) -> Tensor:
    """(B, T): ½·max((V − R)², (V_old + clip(V − V_old, ±clip) − R)²); without a clip ½·(V − R)².

    A value that has moved beyond the clip, towards its return, has no gradient until the next round.
    """
    error_BT = (values_BT - returns_BT).square()
    if clip is not None:
        clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
        error_BT = torch.maximum(error_BT, (clipped_BT - returns_BT).square())
    return torch.where(mask_BT, error_BT / 2, 0.0)


def next_kl_coef(coef: float, kl: float, answers: int, *, target: float, horizon: float) -> float:
    """The adaptive coefficient: β·(1 + clip(KL/target − 1, ±0.2)·answers/horizon) (Ziegler et al., section 2.2).

    `kl` is the mean over the round's answers, in nats per answer. More answers than the horizon count as the
    horizon: else the factor could become negative, and reward divergence.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(answers / horizon, 1.0))


def token_metrics(tokens: TokenLogps, *, clip: float) -> dict[str, Tensor]:
    """(B,) values for the log, detached: means over each answer's tokens, and its score."""
    mask_BT, policy_BT = tokens.mask_BT, tokens.policy_BT.detach()
    old_ratio_BT = log_ratio(policy_BT, tokens.old_policy_BT, mask_BT)
    reference_ratio_BT = log_ratio(policy_BT, tokens.reference_BT, mask_BT)
    clipped_BT = (old_ratio_BT.exp() - 1).abs() > clip
    means = {
        # Never negative, and of less variance than −change (Schulman 2020, "Approximating KL Divergence").
        "approx_kl": old_ratio_BT.exp() - 1 - old_ratio_BT,
        "clip_fraction": clipped_BT.float(),
        # Minus the log-prob of a sampled token estimates the entropy of its distribution.
        "entropy": torch.where(mask_BT, -policy_BT, 0.0),
        "kl_reference": reference_ratio_BT,
    }
    metrics = {name: values_BT.sum(dim=1) / mask_BT.sum(dim=1) for name, values_BT in means.items()}
    return {**metrics, "reward": tokens.scores_B}
