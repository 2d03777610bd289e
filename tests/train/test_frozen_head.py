"""The head that is not trained, against autograd through its logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from prefloop.train.logprobs import frozen_head_logps


def usual(states, weight, bias, targets):
    return -cross_entropy(linear(states, weight, bias).float(), targets, reduction="none")


def draw(bias: bool, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    states = torch.randn(11, 6).to(dtype).requires_grad_()
    weight = torch.randn(37, 6).to(dtype)
    return states, weight, torch.randn(37).to(dtype) if bias else None, torch.randint(37, (11,))


@pytest.mark.parametrize("size", [1, 4, 11, 50])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients_are_those_of_autograd(bias, size):
    states, weight, bias_V, targets = draw(bias)
    got = frozen_head_logps(states, weight, bias_V, targets, size=size)
    wanted = usual(states, weight, bias_V, targets)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    factors = torch.linspace(-2, 3, len(targets))
    (got_gradient,) = torch.autograd.grad((got * factors).sum(), states)
    (wanted_gradient,) = torch.autograd.grad((wanted * factors).sum(), states)
    torch.testing.assert_close(got_gradient, wanted_gradient, atol=1e-5, rtol=1e-5)


def test_a_token_that_is_certain_has_no_gradient():
    states = torch.tensor([[200.0, 0.0]], requires_grad=True)
    logps = frozen_head_logps(states, torch.eye(2), None, torch.tensor([0]), size=1)
    logps.sum().backward()
    assert logps.item() == 0.0
    assert states.grad.tolist() == [[0.0, 0.0]]


def test_bf16_weights_give_float32_log_probs_and_bf16_gradients():
    states, weight, bias, targets = draw(True, torch.bfloat16)
    logps = frozen_head_logps(states, weight, bias, targets, size=4)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, usual(states, weight, bias, targets))
    logps.sum().backward()
    assert states.grad.dtype == torch.bfloat16


def test_bf16_autocast_over_float32_weights_gives_gradients_near_the_exact_ones():
    states, weight, bias, targets = draw(True)
    with torch.autocast("cpu", torch.bfloat16):
        logps = frozen_head_logps(states, weight, bias, targets, size=4)
    (got,) = torch.autograd.grad(logps.sum(), states)
    (wanted,) = torch.autograd.grad(usual(states, weight, bias, targets).sum(), states)
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)
