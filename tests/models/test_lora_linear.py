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


# In bfloat16 a layer and its adapter are one product.


def half(inputs: int = 256, outputs: int = 192, size: float = 1e-4):
    """A layer in bfloat16, its adapter in float32 with a B that adds about `size` of the output, and inputs."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(inputs, outputs)).to(torch.bfloat16)
    model = get_peft_model(layer, LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    with torch.no_grad():
        b = model.base_model.model[0].lora_B["default"].weight
        b.normal_(std=size)
    return model, torch.randn(512, inputs).to(torch.bfloat16)


def share_of_effect(model, x) -> float:
    """How much of what the adapter adds, in exact numbers, arrives in the outputs."""
    layer = model.base_model.model[0]
    a, b = (w["default"].weight.double() for w in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        added = x.double() @ a.t() @ b.t() * layer.scaling["default"]
        on = model(x).double()
        with model.disable_adapter():
            off = model(x).double()
    return float((on - off).mul(added).sum() / added.square().sum())


def test_what_a_young_adapter_adds_in_bfloat16_is_not_rounded_away():
    """Each output is rounded once, so that a small addition moves as many of them over a digit as it should."""
    model, x = half()
    usual = share_of_effect(model, x)
    lora_linear.fuse(model)
    assert usual < 0.5, "PEFT rounds the layer's output before it adds"
    assert share_of_effect(model, x) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_in_bfloat16_is_one_product_under_autocast_too(autocast, monkeypatch):
    """A trainer's autocast changes nothing where all is bfloat16."""
    model, x = half(size=0.02)
    lora_linear.fuse(model)
    calls = []
    real = lora_linear._WideLoraLinear.apply
    monkeypatch.setattr(
        lora_linear,
        "_WideLoraLinear",
        types.SimpleNamespace(apply=lambda *a: calls.append(1) or real(*a)),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answer(model, x)
    assert len(calls) == 1


def test_a_fresh_adapter_in_bfloat16_changes_no_bit():
    model, x = half(size=0)
    lora_linear.fuse(model)
    on = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), on)


def test_gradients_in_bfloat16_are_those_of_float32():
    model, x = half(size=0.02)
    exact = copy.deepcopy(model).float()
    lora_linear.fuse(model)
    x = x.requires_grad_()
    first = model(x)
    # Another pass between, with another B: the first one's backward pass still has its own.
    b = model.base_model.model[0].lora_B["default"].weight
    kept = b.detach().clone()
    with torch.no_grad():
        b.zero_()
        model(x)
        b.copy_(kept)
    wanted = answer(exact, x.detach().float())
    (first * torch.linspace(-1, 2, first.numel()).view(first.shape)).sum().backward()
    pairs = [(x.grad, wanted[1])]
    pairs += [(dict(model.named_parameters())[name].grad, g) for name, g in wanted[2].items()]
    for got, want in pairs:
        apart = (got.double() - want.double()).norm() / want.double().norm()
        assert apart < 0.01
    assert all(g.dtype == torch.float32 for _, g in pairs[1:])


def test_weights_in_wide_rows_are_the_weights():
    """Read, merged and taken out again, they are what they were."""
    model, x = half()
    weight = model.base_model.model[0].base_layer.weight
    before = weight.detach().clone()
    lora_linear.fuse(model)
    assert torch.equal(weight, before)
    assert not weight.is_contiguous()
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), model(x), atol=0.02, rtol=0.02)
    assert torch.equal(model.unload()[0].weight, before)


def test_weights_that_are_to_be_sharded_get_their_rows_back():
    """FSDP takes no weights with gaps between their rows."""
    model, x = half()
    usual = model(x)
    lora_linear.fuse(model)
    assert not torch.equal(model(x), usual)
    lora_linear.narrow(model)
    assert model.base_model.model[0].base_layer.weight.is_contiguous()
    assert torch.equal(model(x), usual)


def test_a_quantized_weight_is_not_moved():
    """torchao's weights are tensors of a type of their own, with the dtype that they are read as."""

    class Quantized(torch.Tensor):
        pass

    model, x = half()
    layer = model.base_model.model[0].base_layer
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantized), requires_grad=False)
    before = layer.weight
    usual = model(x)
    lora_linear.fuse(model)
    assert layer.weight is before
    assert layer.weight.is_contiguous()
    assert torch.equal(model(x), usual)


def test_a_second_adapter_of_another_rank_is_added_as_peft_does():
    """The matrix has room for the first one's rank."""
    model, x = half(size=1e-2)
    model.add_adapter("small", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    usual = copy.deepcopy(model)
    lora_linear.fuse(model)
    first = model(x)
    for one in (model, usual):
        one.set_adapter("small")
    torch.testing.assert_close(model(x), usual(x), atol=0.02, rtol=0.02)
    assert not lora_linear.is_joined(model.base_model.model[0])
    with model.disable_adapter(), usual.disable_adapter():
        torch.testing.assert_close(model(x), usual(x), atol=0.02, rtol=0.02)
    model.set_adapter("default")
    assert torch.equal(model(x), first)
