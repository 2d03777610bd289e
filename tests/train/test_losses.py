"""Losses against hand values, independent transcriptions, identities, gradients and properties."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from prefloop.train import losses
from prefloop.train.losses import GroupLogps

LOG2 = math.log(2)

Loss = Callable[..., Tensor]

# Every loss of log-ratios, with options that are all different, by the number of its log-ratios.
OF_TWO: dict[str, Loss] = {
    "dpo": lambda w, r: losses.dpo(w, r, beta=0.1),
    "dpop": lambda w, r: losses.dpop(w, r, beta=0.1, gamma=5.0),
    "arop": lambda w, r: losses.arop(w, r, torch.full_like(w, 0.7), beta=0.1),
    "dpo_smoothed": lambda w, r: losses.dpo_smoothed(w, r, torch.full_like(w, 0.1), beta=0.1),
    "ipo": lambda w, r: losses.ipo(
        w,
        r,
        chosen_length_B=torch.full_like(w, 4),
        rejected_length_B=torch.full_like(w, 3),
        beta=0.1,
    ),
}
OF_THREE: dict[str, Loss] = {
    "spac_linear": lambda y, w, r: losses.spac_linear(y, w, r, eta=0.1, lam=0.5),
    "spac_smoothed": lambda y, w, r: losses.spac_smoothed(y, w, r, eta=0.1, lam=0.5),
    "spacp": lambda t, w, r: losses.spacp(t, w, r, eta=0.1, gamma=5.0, lam=0.5),
    "spacp_linear": lambda t, w, r: losses.spacp_linear(t, w, r, eta=0.1, gamma=5.0, lam=0.5),
    "spacp_printed": lambda t, w, r: losses.spacp_printed(t, w, r, eta=0.1, gamma=5.0, lam=0.5),
}
ALL = {**OF_TWO, **OF_THREE}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ratios(count: int, seed: int = 0) -> list[Tensor]:
    """`count` vectors of 6 log-ratios of both signs, a few nats wide."""
    generator = torch.Generator().manual_seed(seed)
    return list(8 * torch.randn(count, 6, generator=generator, dtype=torch.float64))


def arity(name: str) -> int:
    return 2 if name in OF_TWO else 3


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ---- hand values


@pytest.mark.parametrize(
    ("gap", "expected"),
    [(0.0, 0.693147), (10.0, 0.313262), (20.0, 0.126928), (-10.0, 1.313262)],
)
def test_dpo_hand_values(gap: float, expected: float) -> None:
    """β = 0.1, so R = gap/10 and the loss is log(1 + e^−R).

    R = 0: log 2; R = 1: log(1 + 0.367879); R = 2: log(1 + 0.135335); R = −1: log(1 + 2.718282).
    """
    loss = losses.dpo(vector(gap - 3.0), vector(-3.0), beta=0.1)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("gap", "margin", "expected"),
    [(10.0, 1.0, 0.693147), (0.0, 1.0, 1.313262), (20.0, 1.0, 0.313262), (10.0, 0.0, 0.313262)],
)
def test_arop_hand_values(gap: float, margin: float, expected: float) -> None:
    """β = 0.1: the argument is gap/10 − M, so gap 10 just meets M = 1 and the loss is log 2."""
    loss = losses.arop(vector(gap), vector(0.0), vector(margin), beta=0.1)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [(10.0, 0.0, 0.313262), (-2.0, -22.0, 0.313262), (-2.0, -2.0, 1.313262)],
)
def test_dpop_hand_values(chosen: float, rejected: float, expected: float) -> None:
    """β = 0.1, γ = 5.

    r_w = 10: P = 0, argument 0.1·10 = 1. r_w = −2: P = 2, so γP = 10 is taken from the gap:
    gap 20 leaves argument 1, gap 0 leaves −1.
    """
    loss = losses.dpop(vector(chosen), vector(rejected), beta=0.1, gamma=5.0)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_ipo_divides_each_log_ratio_by_its_own_length() -> None:
    """r_w/|y_w| = 12/3 = 4, r_l/|y_l| = −10/5 = −2, 1/(2·0.25) = 2: (4 + 2 − 2)² = 16."""
    loss = losses.ipo(
        vector(12.0),
        vector(-10.0),
        chosen_length_B=torch.tensor([3]),
        rejected_length_B=torch.tensor([5]),
        beta=0.25,
    )
    assert loss.item() == pytest.approx(16.0, abs=1e-12)


def test_ipo_is_zero_when_gap_is_half_inverse_beta() -> None:
    """β = 0.1: the gap of per-token ratios must be 5; here 30/5 − 4/4 = 5."""
    loss = losses.ipo(
        vector(30.0),
        vector(4.0),
        chosen_length_B=torch.tensor([5]),
        rejected_length_B=torch.tensor([4]),
        beta=0.1,
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


def test_sft_is_mean_negative_logprob_a_token() -> None:
    """12 nats over 4 tokens are 3 nats a token; 5 over 2 are 2.5."""
    same(losses.sft(vector(-12.0, -5.0), torch.tensor([4, 2])), vector(3.0, 2.5))


def test_penalty_is_the_shortfall_below_the_reference() -> None:
    same(losses.penalty(vector(-3.0, 0.0, 2.0)), vector(3.0, 0.0, 0.0))


def test_nll_penalty_is_gamma_times_sft() -> None:
    same(losses.nll_penalty(vector(-12.0), torch.tensor([4]), gamma=5.0), vector(15.0))


def test_dpo_smoothed_hand_values() -> None:
    """R = 1: −log σ(1) = 0.313262, −log σ(−1) = 1.313262; α mixes them: 0, a quarter, a half."""
    loss = losses.dpo_smoothed(
        vector(10.0, 10.0, 10.0), vector(0.0, 0.0, 0.0), vector(0.0, 0.25, 0.5), beta=0.1
    )
    torch.testing.assert_close(loss, vector(0.313262, 0.563262, 0.813262), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.spacp, 0.693147 + 0.156631),
        (losses.spacp_linear, 0.0 + 0.156631),
        (losses.spacp_printed, 0.974077 + 0.156631),
    ],
)
def test_spacp_hand_values(loss: Loss, expected: float) -> None:
    """η = 0.1, γ = 5, λ = 0.5; r_t = −2, r⁺ = −12, r⁻ = −22, so P = 2 and γP = 10.

    Second term of all: 0.1·(−2 + 22 − 10) = 1, and 0.5·0.313262 = 0.156631. First term:
    smoothed 0.1·(−2 + 12 − 10) = 0, log 2; linear 0.1·(−12 + 2 + 10) = 0;
    printed 0.1·(−1 − 11 + 12 − 5) = −0.5, log(1 + e^0.5) = 0.974077.
    """
    actual = loss(vector(-2.0), vector(-12.0), vector(-22.0), eta=0.1, gamma=5.0, lam=0.5)
    assert actual.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(losses.spac_linear, -1.0 + 0.063464), (losses.spac_smoothed, 0.313262 + 0.063464)],
)
def test_spac_hand_values(loss: Loss, expected: float) -> None:
    """η = 0.1, λ = 0.5; r(y) = 0, r⁺ = 10, r⁻ = −10.

    Second term: 0.1·20 = 2, and 0.5·0.126928 = 0.063464. First term: linear 0.1·(0 − 10) = −1;
    smoothed −log σ(1) = 0.313262.
    """
    actual = loss(vector(0.0), vector(10.0), vector(-10.0), eta=0.1, lam=0.5)
    assert actual.item() == pytest.approx(expected, abs=1e-6)


# ---- the same equations written as choice probabilities


def choice(a: float, b: float) -> float:
    """−log of the Bradley-Terry probability that reward a is preferred to reward b."""
    return -math.log(math.exp(a) / (math.exp(a) + math.exp(b)))


def shortfall(r: float) -> float:
    return (abs(r) - r) / 2


def by_choice(name: str, *r: float) -> float:
    """Loss `name` of ALL at one example, in floats; the penalty raises the opponent's reward."""
    b, g, k = 0.1, 5.0, 0.5
    if name in OF_TWO:
        w, j = r
        h = w / 4 - j / 3
        return {
            "dpo": choice(b * w, b * j),
            "dpop": choice(b * w, b * (j + g * shortfall(w))),
            "arop": choice(b * w, b * j + 0.7),
            "dpo_smoothed": 0.9 * choice(b * w, b * j) + 0.1 * choice(b * j, b * w),
            "ipo": h * h - h / b + 1 / (4 * b * b),
        }[name]
    t, w, j = r
    p = g * shortfall(t)
    penalised = k * choice(b * t, b * (j + p))
    return {
        "spac_linear": math.log(math.exp(b * t) / math.exp(b * w)) + k * choice(b * w, b * j),
        "spac_smoothed": choice(b * w, b * t) + k * choice(b * w, b * j),
        "spacp": choice(b * t, b * (w + p)) + penalised,
        "spacp_linear": math.log(math.exp(b * (w + p)) / math.exp(b * t)) + penalised,
        "spacp_printed": choice(b * (t + j) / 2, b * (w + p / 2)) + penalised,
    }[name]


@pytest.mark.parametrize("name", ALL)
def test_loss_agrees_with_an_independent_transcription(name: str) -> None:
    inputs = ratios(arity(name), seed=1)
    assert inputs[0].min() < 0 < inputs[0].max(), "both sides of the penalty must be met"
    expected = [by_choice(name, *row) for row in torch.stack(inputs, dim=1).tolist()]
    torch.testing.assert_close(ALL[name](*inputs), vector(*expected), rtol=1e-10, atol=1e-10)


# ---- identities


def test_arop_without_margin_is_dpo() -> None:
    chosen, rejected = ratios(2)
    same(
        losses.arop(chosen, rejected, torch.zeros_like(chosen), beta=0.1),
        losses.dpo(chosen, rejected, beta=0.1),
    )


def test_arop_is_dpo_with_the_reference_raised_on_chosen() -> None:
    """β·(r_w − M/β) = β·r_w − M."""
    chosen, rejected = ratios(2)
    margin = ratios(1, seed=5)[0].abs()
    same(
        losses.arop(chosen, rejected, margin, beta=0.1),
        losses.dpo(chosen - margin / 0.1, rejected, beta=0.1),
    )


def test_dpop_without_penalty_is_dpo() -> None:
    chosen, rejected = ratios(2)
    same(losses.dpop(chosen, rejected, beta=0.1, gamma=0.0), losses.dpo(chosen, rejected, beta=0.1))


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_spacp_with_equal_samples_is_dpop_times_one_plus_lambda(lam: float) -> None:
    """IAL eq. 11."""
    target, sample = ratios(2)
    same(
        losses.spacp(target, sample, sample, eta=0.1, gamma=5.0, lam=lam),
        (1 + lam) * losses.dpop(target, sample, beta=0.1, gamma=5.0),
    )


def test_spacp_without_penalty_is_smoothed_spac_with_target_as_better() -> None:
    """SPAC's y⁺ is y_t, its on-policy sample y is SPACP's y⁺; y⁻ stays."""
    target, chosen, rejected = ratios(3)
    same(
        losses.spacp(target, chosen, rejected, eta=0.1, gamma=0.0, lam=0.5),
        losses.spac_smoothed(chosen, target, rejected, eta=0.1, lam=0.5),
    )


def test_linear_spacp_without_penalty_is_linear_spac_with_target_as_better() -> None:
    target, chosen, rejected = ratios(3)
    same(
        losses.spacp_linear(target, chosen, rejected, eta=0.1, gamma=0.0, lam=0.5),
        losses.spac_linear(chosen, target, rejected, eta=0.1, lam=0.5),
    )


def test_printed_spacp_differs_from_default_unless_the_sides_agree() -> None:
    """½(r_t + r⁻) − r⁺ − ½γP = r_t − r⁺ − γP only where r⁻ = r_t − γP."""
    target, chosen, rejected = ratios(3)
    options = {"eta": 0.1, "gamma": 5.0, "lam": 0.5}
    apart = losses.spacp_printed(target, chosen, rejected, **options)
    assert not torch.isclose(apart, losses.spacp(target, chosen, rejected, **options)).any()
    agreeing = target - 5.0 * losses.penalty(target)
    same(
        losses.spacp_printed(target, chosen, agreeing, **options),
        losses.spacp(target, chosen, agreeing, **options),
    )


def test_spacp_raises_twice_the_margin_of_the_paper() -> None:
    """At λ = 1, γ = 0 and π = π_ref the descent direction is η·∇Margin, Margin = r_t − (r⁺ + r⁻)/2.

    Each −log σ has slope −½ at 0, so the two arguments, which add up to 2η·Margin, are
    raised equally.
    """
    at_reference = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    loss = losses.spacp(*at_reference, eta=0.1, gamma=5.0, lam=1.0).sum()
    descent = [-gradient.item() for gradient in torch.autograd.grad(loss, at_reference)]
    assert descent == pytest.approx([0.1, -0.05, -0.05], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", LOG2),
        ("dpop", LOG2),
        ("dpo_smoothed", LOG2),
        ("arop", math.log(1 + math.exp(0.7))),
        ("ipo", 25.0),
        ("spac_linear", 0.5 * LOG2),
        ("spac_smoothed", 1.5 * LOG2),
        ("spacp", 1.5 * LOG2),
        ("spacp_linear", 0.5 * LOG2),
        ("spacp_printed", 1.5 * LOG2),
    ],
)
def test_value_where_policy_is_reference(name: str, expected: float) -> None:
    """M = 0.7, λ = 0.5, IPO's 1/(2β) = 5."""
    zeros = [torch.zeros(2, dtype=torch.float64)] * arity(name)
    same(ALL[name](*zeros), vector(expected, expected))


# ---- gradients


@pytest.mark.parametrize("name", ALL)
def test_gradient_agrees_with_finite_differences(name: str) -> None:
    inputs = tuple(ratio.requires_grad_() for ratio in ratios(arity(name), seed=2))
    assert inputs[0].abs().min() > 1e-3, "the penalty has a kink at 0"
    assert gradcheck(ALL[name], inputs)


def test_penalty_gradient_is_zero_above_and_minus_one_below_the_reference() -> None:
    """With respect to log π(y_t|x): −1 below, 0 above, 0 where policy and reference are equal."""
    target = vector(-3.0, -1e-6, 0.0, 1e-6, 2.0).requires_grad_()
    losses.penalty(target).sum().backward()
    assert target.grad is not None
    assert target.grad.tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0]


def test_no_gradient_flows_through_margin_or_smoothing() -> None:
    chosen, rejected, extra = (ratio.requires_grad_() for ratio in ratios(3))
    losses.arop(chosen, rejected, extra, beta=0.1).sum().backward()
    losses.dpo_smoothed(chosen, rejected, extra, beta=0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert extra.grad is None


# ---- properties

anywhere = st.floats(-1e4, 1e4, width=32)
step = st.floats(0.0, 1e3, width=32)
FALLS_WITH = {
    "dpo": (1, -1),
    "dpop": (1, -1),
    "arop": (1, -1),
    "spac_smoothed": (-1, 1, -1),
    "spac_linear": (-1, 1, -1),
    "spacp": (1, -1, -1),
    "spacp_linear": (1, -1, -1),
    "spacp_printed": (1, -1, 0),
}
"""Sign of the change of each log-ratio that never raises the loss; 0 where neither does."""


@pytest.mark.parametrize("name", FALLS_WITH)
@settings(max_examples=40, deadline=None)
@given(values=st.tuples(anywhere, anywhere, anywhere), rise=step)
def test_loss_never_rises_where_a_ratio_moves_its_way(
    name: str, values: tuple[float, ...], rise: float
) -> None:
    base = [vector(value) for value in values[: arity(name)]]
    before = ALL[name](*base)
    for index, sign in enumerate(FALLS_WITH[name]):
        moved = [*base[:index], base[index] + sign * rise, *base[index + 1 :]]
        slack = 1e-9 * (1 + before.abs())
        assert sign == 0 or (ALL[name](*moved) <= before + slack).all()


@settings(max_examples=40, deadline=None)
@given(gap=anywhere, margin=step, rise=step)
def test_arop_never_falls_as_the_margin_grows(gap: float, margin: float, rise: float) -> None:
    smaller, larger = (
        losses.arop(vector(gap), vector(0.0), vector(m), beta=0.1) for m in (margin, margin + rise)
    )
    assert (larger >= smaller).all()


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(values=st.tuples(anywhere, anywhere, anywhere))
def test_loss_and_gradient_are_finite_at_extreme_ratios(
    name: str, values: tuple[float, ...]
) -> None:
    inputs = [torch.tensor([value], requires_grad=True) for value in values[: arity(name)]]
    loss = ALL[name](*inputs)
    assert loss.isfinite().all()
    for gradient in torch.autograd.grad(loss.sum(), inputs):
        assert gradient.isfinite().all()


def test_dpo_keeps_its_exact_tails_in_float32() -> None:
    """Far right the loss is 0 and flat, far left it is |R| with slope −β on the chosen ratio."""
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = losses.dpo(chosen, torch.zeros(2), beta=0.1)
    loss.sum().backward()
    assert chosen.grad is not None
    assert loss.tolist() == [0.0, 1000.0]
    torch.testing.assert_close(chosen.grad, torch.tensor([0.0, -0.1]))


# ---- the contract of every public function, which new ones join by themselves

PUBLIC = {
    name: function
    for name, function in inspect.getmembers(losses, inspect.isfunction)
    if function.__module__ == losses.__name__ and not name.startswith("_")
}


def call(function: Loss, make: Callable[[int], Tensor]) -> Tensor:
    """Call with `make(position)` for every tensor and 0.5 for every option."""
    names = enumerate(inspect.signature(function).parameters)
    return function(**{name: make(i) if name.endswith("_B") else 0.5 for i, name in names})


@pytest.mark.parametrize("name", PUBLIC)
def test_loss_is_per_example(name: str) -> None:
    """The batch's value at b is the value of example b alone."""
    rows = [ratio.abs() + 1 for ratio in ratios(4)]
    batched = call(PUBLIC[name], rows.__getitem__)
    alone = [call(PUBLIC[name], lambda i, b=b: rows[i][b : b + 1]) for b in range(6)]
    same(batched, torch.cat(alone))


@pytest.mark.parametrize(
    ("given_dtype", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("name", PUBLIC)
def test_loss_is_computed_in_float32_or_wider(
    name: str, given_dtype: torch.dtype, computed: torch.dtype
) -> None:
    actual = call(PUBLIC[name], lambda i: vector(2.0 + i).to(given_dtype))
    assert actual.dtype == computed
    expected = call(PUBLIC[name], lambda i: vector(2.0 + i)).to(computed)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_loss_refuses_tensors_that_are_not_vectors(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected tensors of one shape \(B,\), got \w+_B \("):
        call(PUBLIC[name], lambda _: torch.ones(shape))


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "penalty"])
def test_loss_refuses_batches_of_two_sizes(name: str) -> None:
    """Broadcasting (1,) against (3,) would quietly pair one reference with all."""
    with pytest.raises(ValueError, match=r"expected tensors of one shape \(B,\)"):
        call(PUBLIC[name], lambda i: torch.ones(1 if i == 0 else 3))


# ---- the record


def group(**changes: object) -> GroupLogps:
    fields: dict[str, object] = {
        "policy": {"chosen": vector(-5.0, -7.0), "rejected": vector(-6.0, -9.0)},
        "reference": {"chosen": vector(-4.0, -9.0), "rejected": vector(-6.0, -9.0)},
        "lengths": {"chosen": torch.tensor([3, 4]), "rejected": torch.tensor([2, 5])},
        "margin_B": torch.zeros(2),
    }
    return GroupLogps(**{**fields, **changes})  # type: ignore[arg-type]


def test_ratio_is_policy_minus_reference() -> None:
    assert group().ratio("chosen").tolist() == [-1.0, 2.0]


def test_ratio_subtracts_in_float32() -> None:
    """511 needs nine bits: bfloat16, which has eight, would give 512."""
    policy, reference = (torch.tensor([x], dtype=torch.bfloat16) for x in (-512.0, -1.0))
    logps = GroupLogps(
        policy={"chosen": policy},
        reference={"chosen": reference},
        lengths={"chosen": torch.tensor([9])},
        margin_B=torch.zeros(1),
    )
    assert logps.ratio("chosen").tolist() == [-511.0]


def test_ratio_sends_gradient_to_the_policy_only() -> None:
    policy, reference = vector(-5.0, -7.0).requires_grad_(), vector(-4.0, -9.0).requires_grad_()
    logps = group(
        policy={"chosen": policy, "rejected": policy},
        reference={"chosen": reference, "rejected": reference},
    )
    logps.ratio("chosen").sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [1.0, 1.0]
    assert reference.grad is None


def test_group_refuses_roles_that_differ() -> None:
    with pytest.raises(ValueError, match=r"same roles.*\['chosen', 'rejected'\] and \['chosen'\]"):
        group(lengths={"chosen": torch.tensor([3, 4])})


def test_group_refuses_a_tensor_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"margin_B \(3,\), policy\[chosen\] \(2,\)"):
        group(margin_B=torch.zeros(3))
