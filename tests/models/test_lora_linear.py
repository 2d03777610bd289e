"""Fused LoRA layers against PEFT's own."""

import copy
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prefloop.models import lora_linear


class Model(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=bias), nn.Linear(8, 5, bias=bias)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def adapted(dropout: float = 0.0, **options):
    torch.manual_seed(0)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        lora_dropout=dropout,
        target_modules=["first", "second"],
        init_lora_weights=False,
        **options,
    )
    return get_peft_model(Model(), config)


def answer(model, x):
    """Output and the gradients of all that has one."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    gradients = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    return y.detach(), x.grad, gradients


@pytest.fixture
def calls(monkeypatch):
    """How often a fused layer was really used."""
    found = []
    real = lora_linear._LoraLinear.apply

    def counted(*args):
        found.append(1)
        return real(*args)

    monkeypatch.setattr(lora_linear, "_LoraLinear", types.SimpleNamespace(apply=counted))
    return found


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_output_and_gradients_are_peft_s(shape, calls):
    usual, x = adapted(), torch.randn(shape)
    fused = copy.deepcopy(usual)
    lora_linear.fuse(fused)
    got, wanted = answer(fused, x), answer(usual, x)
    assert len(calls) == 2
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert wanted[2].keys() == {n for n, w in usual.named_parameters() if w.requires_grad}


@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str
)
def test_what_is_not_plain_is_left_to_peft(options, calls):
    model, x = adapted(**options), torch.randn(4, 6)
    lora_linear.fuse(model)
    torch.manual_seed(1)
    answer(model, x)
    assert not calls


def test_an_adapter_that_is_switched_off_is_off(calls):
    model, x = adapted(), torch.randn(4, 6)
    lora_linear.fuse(model)
    with model.disable_adapter():
        off = model(x)
    assert not calls
    torch.testing.assert_close(model.unload()(x), off)


def test_merging_gives_the_same_outputs(calls):
    model, x = adapted(), torch.randn(4, 6)
    lora_linear.fuse(model)
    before = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), before, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


def test_autocast_is_left_to_peft(calls):
    model = adapted()
    lora_linear.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 6))
    assert not calls
