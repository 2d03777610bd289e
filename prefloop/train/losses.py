"""Preference losses as pure functions of log-ratios; they return per-example losses, not their mean.

Shape suffix: B groups (one prompt with its chosen, rejected and perhaps target response).

A log-ratio is r(y) = log π(y|x) − log π_ref(y|x) in nats, where log π(y|x) is the **sum** over the
tokens of the response, end-of-turn included, prompt excluded, temperature 1. Arguments that are
log-ratios are named by the response's role: `target_B` is r(y_t), `chosen_B` r(y_w) or r(y⁺),
`rejected_B` r(y_l) or r(y⁻). Arguments that are plain log-probs are named `logp_B`.

All functions take tensors of shape (B,) and raise ValueError for any other; they compute in float32
(float64 if given float64) and stay finite for log-ratios of any size met in training. Options such
as `beta` are not checked here; the methods' options check them.

SPIN (Chen et al. 2024) needs no function: it is `dpo` with chosen = the target response, rejected =
the policy's own sample, and the reference = the policy at the round's start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


@dataclass(frozen=True)
class GroupLogps:
    """The input of a method's loss for B groups; all three mappings have the same roles."""

    policy: Mapping[str, Tensor]
    """Role ("chosen", "rejected", perhaps "target") to (B,) summed log-probs (nats), with grad."""
    reference: Mapping[str, Tensor]
    """Role to (B,) summed log-probs (nats) under the reference; no gradient."""
    lengths: Mapping[str, Tensor]
    """Role to (B,) tokens of the response, end-of-turn included; at least 1."""
    margin_B: Tensor
    """AROP's M, at least 0; zeros where the method has none."""
    smoothing_B: Tensor | None = None
    """SPA's alpha, from 0 to 1/2; None is zeros."""

    def __post_init__(self) -> None:
        """Raise ValueError unless the roles agree and every tensor is (B,)."""
        if not self.policy.keys() == self.reference.keys() == self.lengths.keys():
            raise ValueError(
                "policy, reference and lengths must hold the same roles, they hold "
                f"{list(self.policy)}, {list(self.reference)} and {list(self.lengths)}"
            )
        _check_shapes(
            margin_B=self.margin_B,
            **({} if self.smoothing_B is None else {"smoothing_B": self.smoothing_B}),
            **{f"policy[{role}]": logp_B for role, logp_B in self.policy.items()},
            **{f"reference[{role}]": logp_B for role, logp_B in self.reference.items()},
            **{f"lengths[{role}]": length_B for role, length_B in self.lengths.items()},
        )

    def ratio(self, role: str) -> Tensor:
        """r(y) of the response in this role, (B,); gradient flows through the policy only."""
        return _float(self.policy[role]) - _float(self.reference[role]).detach()


class LossOutput(NamedTuple):
    """The output of a method's loss; the trainer takes the mean."""

    loss_B: Tensor
    metrics: dict[str, Tensor]
    """Name -> (B,) values for the log, detached."""


def _check_shapes(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are (B,) with one B."""
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) != 1 or len(shapes.pop()) != 1:
        seen = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"expected tensors of one shape (B,), got {seen}")


def _float(tensor: Tensor) -> Tensor:
    """The tensor in the dtype losses are computed in: float64 stays, all else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def sft(logp_B: Tensor, length_B: Tensor) -> Tensor:
    """Mean negative log-prob a token, −log π(y_t|x) / |y_t| (IAL eq. 4).

    Takes log-probs of the policy, not log-ratios. The mean is taken within each response first, so
    every response weighs the same, whatever its length.
    """
    _check_shapes(logp_B=logp_B, length_B=length_B)
    return -_float(logp_B) / length_B


def dpo(chosen_B: Tensor, rejected_B: Tensor, *, beta: float) -> Tensor:
    """DPO: −log σ(β·(r(y_w) − r(y_l))) (Rafailov et al. 2023, eq. 7)."""
    _check_shapes(chosen_B=chosen_B, rejected_B=rejected_B)
    return -logsigmoid(beta * (_float(chosen_B) - _float(rejected_B)))


def dpo_smoothed(
    chosen_B: Tensor, rejected_B: Tensor, smoothing_B: Tensor, *, beta: float
) -> Tensor:
    """DPO under label noise: (1 − α)·DPO + α·DPO with the pair swapped (SPA, Kim et al. 2025).

    `smoothing_B` is α for each pair, in [0, ½]: SPA gives its α to the least confident pairs and 0
    to the others. No gradient flows through it.
    """
    _check_shapes(chosen_B=chosen_B, rejected_B=rejected_B, smoothing_B=smoothing_B)
    alpha_B = _float(smoothing_B).detach()
    as_labelled_B = dpo(chosen_B, rejected_B, beta=beta)
    swapped_B = dpo(rejected_B, chosen_B, beta=beta)
    return (1 - alpha_B) * as_labelled_B + alpha_B * swapped_B


def ipo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    chosen_length_B: Tensor,
    rejected_length_B: Tensor,
    beta: float,
) -> Tensor:
    """IPO: (r(y_w)/|y_w| − r(y_l)/|y_l| − 1/(2β))² (Azar et al. 2023, eq. 17, whose τ is our β).

    Convention: takes summed log-ratios like all others and divides each by its own response's
    length in tokens, as TRL does. Other code squares the difference of the sums; the same β then
    means another target, and long responses dominate the batch.
    """
    _check_shapes(
        chosen_B=chosen_B,
        rejected_B=rejected_B,
        chosen_length_B=chosen_length_B,
        rejected_length_B=rejected_length_B,
    )
    gap_B = _float(chosen_B) / chosen_length_B - _float(rejected_B) / rejected_length_B
    return (gap_B - 1 / (2 * beta)).square()


def arop(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor, *, beta: float) -> Tensor:
    """AROP: −log σ(β·(r(y_w) − r(y_l)) − M) (AROP section 4.3).

    M is `margin_B`, in units of the implicit reward (so β does not scale it). No gradient flows
    through it.
    """
    _check_shapes(chosen_B=chosen_B, rejected_B=rejected_B, margin_B=margin_B)
    reward_gap_B = beta * (_float(chosen_B) - _float(rejected_B))
    return -logsigmoid(reward_gap_B - _float(margin_B).detach())


def penalty(target_B: Tensor) -> Tensor:
    """P = max(0, −r(y_t)): how far, in nats, the policy fell below the reference on the target.

    From DPOP (Pal et al. 2024) and IAL eq. 10. The gradient is −∇log π(y_t|x) below the reference
    and 0 above; at equality, where every round starts, it is 0, so that the first step is DPO's.
    """
    _check_shapes(target_B=target_B)
    return relu(-_float(target_B))


def nll_penalty(logp_B: Tensor, length_B: Tensor, *, gamma: float) -> Tensor:
    """γ·(−log π(y_t|x) / |y_t|), which replaces γ·P in the ablation of IAL appendix C, Q2.

    It is added outside the sigmoids: `spacp(..., gamma=0.0, ...) + nll_penalty(..., gamma=gamma)`,
    and the same with `spacp_linear` and `spacp_printed`. Takes log-probs of the policy, not
    log-ratios.
    """
    return gamma * sft(logp_B, length_B)


def dpop(chosen_B: Tensor, rejected_B: Tensor, *, beta: float, gamma: float) -> Tensor:
    """DPOP: −log σ(β·(r(y_w) − r(y_l) − γ·P(y_w))) (Pal et al. 2024, whose λ is our γ)."""
    _check_shapes(chosen_B=chosen_B, rejected_B=rejected_B)
    gap_B = _float(chosen_B) - _float(rejected_B) - gamma * penalty(chosen_B)
    return -logsigmoid(beta * gap_B)


def spac_linear(
    sample_B: Tensor, chosen_B: Tensor, rejected_B: Tensor, *, eta: float, lam: float
) -> Tensor:
    """SPAC: η·(r(y) − r(y⁺)) − λ·log σ(η·(r(y⁺) − r(y⁻))) (IAL eq. 9).

    `sample_B` is r of an on-policy sample y. The first term is unbounded below.
    """
    _check_shapes(sample_B=sample_B, chosen_B=chosen_B, rejected_B=rejected_B)
    return eta * (_float(sample_B) - _float(chosen_B)) + lam * dpo(chosen_B, rejected_B, beta=eta)


def spac_smoothed(
    sample_B: Tensor, chosen_B: Tensor, rejected_B: Tensor, *, eta: float, lam: float
) -> Tensor:
    """SPAC: −log σ(η·(r(y⁺) − r(y))) − λ·log σ(η·(r(y⁺) − r(y⁻))) (IAL appendix B.6 on eq. 9).

    `sample_B` is r of an on-policy sample y. The sigmoid bounds the linear form's first term below.
    """
    _check_shapes(sample_B=sample_B, chosen_B=chosen_B, rejected_B=rejected_B)
    return dpo(chosen_B, sample_B, beta=eta) + lam * dpo(chosen_B, rejected_B, beta=eta)


def spacp(
    target_B: Tensor,
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    eta: float,
    gamma: float,
    lam: float,
) -> Tensor:
    """SPACP: −log σ(η·(r(y_t) − r(y⁺) − γ·P)) − λ·log σ(η·(r(y_t) − r(y⁻) − γ·P)), P of y_t.

    IAL eq. 12 in the reading that agrees with its eq. 10, its eq. 11 and the margin the paper
    plots; see `spacp_printed` for the letters. It is DPOP on (y_t, y⁺) plus λ times DPOP on (y_t,
    y⁻).
    """
    _check_shapes(target_B=target_B, chosen_B=chosen_B, rejected_B=rejected_B)
    over_better_B = dpop(target_B, chosen_B, beta=eta, gamma=gamma)
    return over_better_B + lam * dpop(target_B, rejected_B, beta=eta, gamma=gamma)


def spacp_linear(
    target_B: Tensor,
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    eta: float,
    gamma: float,
    lam: float,
) -> Tensor:
    """SPACP: η·(r(y⁺) − r(y_t) + γ·P) − λ·log σ(η·(r(y_t) − r(y⁻) − γ·P)), P of y_t (IAL eq. 10).

    The first term is unbounded below.
    """
    _check_shapes(target_B=target_B, chosen_B=chosen_B, rejected_B=rejected_B)
    deficit_B = _float(chosen_B) - _float(target_B) + gamma * penalty(target_B)
    return eta * deficit_B + lam * dpop(target_B, rejected_B, beta=eta, gamma=gamma)


def spacp_printed(
    target_B: Tensor,
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    eta: float,
    gamma: float,
    lam: float,
) -> Tensor:
    """SPACP with first term −log σ(η·(½r(y_t) + ½r(y⁻) − r(y⁺) − ½γ·P)): IAL eq. 12 to the letter.

    The second term is `spacp`'s. The first raises y⁻ against y⁺, which the paper's text does not
    intend; the form is kept so that its effect can be measured.
    """
    _check_shapes(target_B=target_B, chosen_B=chosen_B, rejected_B=rejected_B)
    held_B = _float(target_B) - gamma * penalty(target_B)
    gap_B = (held_B + _float(rejected_B)) / 2 - _float(chosen_B)
    return -logsigmoid(eta * gap_B) + lam * dpop(target_B, rejected_B, beta=eta, gamma=gamma)


def bradley_terry(
    chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor, *, centering: float
) -> Tensor:
    """A reward model's loss: -log sigmoid(s_w - s_l - m) + centering (s_w + s_l)^2, on scores.

    Source: Ouyang et al. 2022 (arXiv:2203.02155), equation 1; the margin m is Llama 2's
    (arXiv:2307.09288, section 3.2.2), and centering, which fixes the scores' free constant near 0, is that
    of Eisenstein et al. 2023 (arXiv:2312.09244), both as in TRL's RewardTrainer.
    """
    _check_shapes(chosen_B=chosen_B, rejected_B=rejected_B, margin_B=margin_B)
    chosen_B, rejected_B = _float(chosen_B), _float(rejected_B)
    loss_B = -logsigmoid(chosen_B - rejected_B - margin_B)
    return loss_B + centering * (chosen_B + rejected_B) ** 2 if centering else loss_B
