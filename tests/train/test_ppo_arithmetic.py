"""PPO's arithmetic against hand calculations, a slow reference, and what masks promise."""

import math

import pytest
import torch
from torch import Tensor

from prefloop.train import ppo

LENGTHS = [4, 1, 3]
N, T = len(LENGTHS), max(LENGTHS)
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]


def draw(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(N, T, generator=torch.Generator().manual_seed(seed)).double()


def poisoned(values_NT: Tensor) -> Tensor:
    """The same on the answers' tokens, nonsense on the padding."""
    return torch.where(MASK, values_NT, torch.nan)


# Rewards.


def test_the_score_comes_at_the_last_token_and_the_divergence_at_each() -> None:
    """kl_coef 0.5: −0.5·(−1 − −3) = −1, −0.5·(−2 − −1) = 0.5, and 0.5 + 7 at the end; then one token alone."""
    logps = torch.tensor([[-1.0, -2.0, -1.0], [-4.0, 0.0, 0.0]])
    reference = torch.tensor([[-3.0, -1.0, 0.0], [-4.0, -9.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    scores = torch.tensor([7.0, 2.0])
    found = ppo.token_rewards(scores, logps, reference, mask, kl_coef=0.5)
    assert found.tolist() == [[-1.0, 0.5, 7.5], [2.0, 0.0, 0.0]]


def test_normalised_scores_have_mean_0_and_variance_1_over_all_that_were_seen() -> None:
    scores = 5 + 3 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    memory = ppo.Memory(kl_coef=0.1)
    for part in scores.split([7, 1, 32]):
        memory = memory.seeing(part)
    assert (memory.count, memory.kl_coef) == (40, 0.1)
    assert memory.mean == pytest.approx(scores.mean().item(), rel=1e-5)
    assert memory.square / 40 == pytest.approx(scores.var(correction=0).item(), rel=1e-5)
    normal = memory.normalised(scores)
    assert normal.mean().item() == pytest.approx(0, abs=1e-5)
    assert normal.std(correction=0).item() == pytest.approx(1, rel=1e-5)


def test_equal_scores_are_worth_nothing() -> None:
    scores = torch.full((4,), 0.3, dtype=torch.float64)
    memory = ppo.Memory(kl_coef=0.1).seeing(scores)
    assert memory.normalised(scores).abs().max() < 1e-6


# Advantages.


def slow_advantages(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> list[list[float]]:
    """The definition: (1 − λ) times the sum of λ^(k−1) times the k-step advantage, answer by answer."""
    found = []
    for n, length in enumerate(LENGTHS):
        r, v = rewards[n, :length].tolist(), [*values[n, :length].tolist(), 0.0]
        row = []
        for t in range(length):
            steps = []
            for k in range(1, length - t + 1):
                paid = sum(gamma**i * r[t + i] for i in range(k))
                steps.append(paid + gamma**k * v[t + k] - v[t])
            # Beyond the end nothing changes any more, so the last one has all the weight that is left.
            weights = [(1 - lam) * lam ** (k - 1) for k in range(1, len(steps))]
            weights.append(lam ** (len(steps) - 1))
            row.append(sum(w * a for w, a in zip(weights, steps, strict=True)))
        found.append(row)
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_those_of_the_slow_definition(gamma: float, lam: float) -> None:
    rewards = torch.where(MASK, draw(1), 0.0)
    values = poisoned(draw(2))
    found = ppo.gae(rewards, values, MASK, gamma=gamma, lam=lam)
    for n, row in enumerate(slow_advantages(rewards, values, gamma, lam)):
        assert found[n, : LENGTHS[n]].tolist() == pytest.approx(row, rel=1e-12)
    assert not found[~MASK].any()


def test_with_lambda_1_returns_are_the_rewards_to_come() -> None:
    rewards, values = torch.where(MASK, draw(1), 0.0), draw(2)
    returns = ppo.gae(rewards, values, MASK, gamma=1.0, lam=1.0) + values
    for n, length in enumerate(LENGTHS):
        to_come = [rewards[n, t:length].sum().item() for t in range(length)]
        assert returns[n, :length].tolist() == pytest.approx(to_come)


def test_white_advantages_have_mean_0_and_variance_1_over_the_tokens_alone() -> None:
    white = ppo.whiten(poisoned(3 + 5 * draw(3)), MASK)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-7)
    assert white[MASK].var(correction=0).item() == pytest.approx(1, rel=1e-6)
    assert not white[~MASK].any()


@pytest.mark.parametrize("value", [2.5, 0.3])
def test_whitening_equal_advantages_gives_zeros_not_nan(value: float) -> None:
    """A mean of many 0.3 in float32 is none of them, and what it is off by would be all the spread there is."""
    assert not ppo.whiten(torch.full((N, T), value), MASK).any()


def test_explained_variance_is_1_for_perfect_values_and_0_for_constant_ones() -> None:
    returns = poisoned(draw(4))
    assert ppo.explained_variance(returns, returns, MASK) == 1
    constant = torch.full((N, T), 0.7).double()
    assert ppo.explained_variance(constant, returns, MASK) == pytest.approx(0, abs=1e-12)
    assert ppo.explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    assert ppo.explained_variance(returns, constant, MASK) == 0


# Losses.


def test_with_ratio_1_the_policy_loss_is_minus_the_advantage_and_0_in_the_mean_when_white() -> None:
    logps, advantages = draw(5), ppo.whiten(draw(6), MASK)
    loss = ppo.policy_loss(logps, logps.clone(), advantages, MASK, clip=0.2)
    torch.testing.assert_close(loss[MASK], -advantages[MASK], rtol=0, atol=0)
    assert loss.sum().item() == pytest.approx(0, abs=1e-6)


def test_the_policy_gradient_is_the_hand_calculation() -> None:
    """d loss / d log π is −ρ·A where the ratio still pays, 0 where it is beyond the clip (0.2) on the paying side.

    ρ = 1, A = 2: −2. ρ = 1.5, A = 2: 0. ρ = 1.5, A = −2: 3. ρ = 0.5, A = 2: −1. ρ = 0.5, A = −2: 0.
    """
    ratio = torch.tensor([[1.0, 1.5, 1.5, 0.5, 0.5]], dtype=torch.float64)
    advantages = torch.tensor([[2.0, 2.0, -2.0, 2.0, -2.0]], dtype=torch.float64)
    logps = ratio.log().requires_grad_()
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss = ppo.policy_loss(logps, torch.zeros_like(logps), advantages, mask, clip=0.2)
    assert loss[0].tolist() == pytest.approx([-2.0, -2.4, 3.0, -1.0, 1.6])
    loss.sum().backward()
    assert logps.grad is not None
    assert logps.grad[0].tolist() == pytest.approx([-2.0, 0.0, 3.0, -1.0, 0.0])


def test_the_value_loss_is_the_hand_calculation() -> None:
    """Old value 0, clip 0.2: ½(0.1 − 1)² inside; ½(0.2 − 1)², without gradient, where 0.5 went beyond towards 1;
    ½(−0.5 − 1)², with gradient −0.5 − 1, where it went beyond the other way."""
    values = torch.tensor([[0.1, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros_like(values), torch.ones(1, 3, dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = ppo.value_loss(values, old, returns, mask, clip=0.2)
    assert loss[0].tolist() == pytest.approx([0.405, 0.32, 1.125])
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([-0.9, 0.0, -1.5])
    free = ppo.value_loss(values, old, returns, mask, clip=None)
    assert free[0].tolist() == pytest.approx([0.405, 0.125, 1.125])


def test_padding_reaches_neither_losses_nor_gradients() -> None:
    logps, values = (poisoned(draw(n)).requires_grad_() for n in (7, 8))
    policy = ppo.policy_loss(logps, poisoned(draw(9)), poisoned(draw(10)), MASK, clip=0.2)
    value = ppo.value_loss(values, poisoned(draw(11)), poisoned(draw(12)), MASK, clip=0.2)
    assert not policy[~MASK].any()
    assert not value[~MASK].any()
    # As in training, where padding is zeros: what is asked here is that no gradient goes there.
    logps, values = (torch.where(MASK, draw(n), 0.0).requires_grad_() for n in (7, 8))
    policy = ppo.policy_loss(logps, torch.zeros(N, T), draw(10), MASK, clip=0.2)
    value = ppo.value_loss(values, draw(11), draw(12), MASK, clip=None)
    (policy + value).sum().backward()
    for leaf in (logps, values):
        assert leaf.grad is not None
        assert not leaf.grad[~MASK].any()
        assert leaf.grad[MASK].any()


def test_a_wild_ratio_stays_finite() -> None:
    logps = torch.full((1, 1), 500.0, requires_grad=True)
    loss = ppo.policy_loss(
        logps, torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1).bool(), clip=0.2
    )
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-5)
    loss.sum().backward()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


# The KL coefficient.


def test_the_coefficient_follows_the_divergence_by_a_fifth_of_its_share_at_most() -> None:
    """Twice the target: +0.2·64/6400; a tenth over: +0.1 of it; none: −0.2 of it; on target: unchanged."""
    for kl, expected in ((12.0, 1.002), (6.6, 1.001), (0.0, 0.998), (6.0, 1.0)):
        found = ppo.next_kl_coef(1.0, kl, 64, target=6.0, horizon=6400)
        assert found == pytest.approx(expected)


def test_a_horizon_of_less_than_a_round_does_not_turn_the_penalty_into_a_reward() -> None:
    """640 answers are 64 horizons of 10: 1 − 0.2·64 would be negative; a fifth is what a step may take."""
    assert ppo.next_kl_coef(1.0, 0.0, 640, target=6.0, horizon=10) == pytest.approx(0.8)
    assert ppo.next_kl_coef(1.0, 99.0, 640, target=6.0, horizon=10) == pytest.approx(1.2)


# What is logged.


def test_metrics_are_means_over_each_answers_tokens() -> None:
    """Ratios 1.5 and 1 in one answer, 1 in the other: half of the first one's tokens are beyond the clip."""
    change = torch.tensor([[math.log(1.5), 0.0], [0.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    zeros = torch.zeros(2, 2)
    tokens = ppo.TokenLogps(
        policy_BT=change - 2,
        values_BT=zeros,
        old_policy_BT=zeros - 2,
        old_values_BT=zeros,
        reference_BT=zeros - 3,
        advantages_BT=zeros,
        returns_BT=zeros,
        mask_BT=mask,
        scores_B=torch.tensor([1.0, 5.0]),
        mean_length=1.5,
    )
    found = {k: v.tolist() for k, v in ppo.token_metrics(tokens, clip=0.2).items()}
    log = math.log(1.5)
    assert found["clip_fraction"] == [0.5, 0.0]
    assert found["approx_kl"] == pytest.approx([(0.5 - log) / 2, 0.0], abs=1e-6)
    assert found["entropy"] == pytest.approx([2 - log / 2, 2.0])
    assert found["kl_reference"] == pytest.approx([1 + log / 2, 1.0])
    assert found["reward"] == [1.0, 5.0]
