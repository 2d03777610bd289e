"""Decoder layers in C against the models' own, with adapters and without, and which layers are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from prefloop.generate import fallback
from prefloop.generate.cpu import compiled, layers
from prefloop.generate.cpu.layers import FusedLayer
from prefloop.generate.cpu.prepared import Prepared
from prefloop.models import lora_linear
from tests.c_compiler import needs_c_compiler

pytestmark = [
    needs_c_compiler,
    # PEFT asks transformers by a name of before.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip
LORA: dict[str, Any] = {
    "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False,
}  # fmt: skip


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def llama_biased() -> Any:
    config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=8)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def mistral_windowed() -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7))


def qwen2_half_windowed() -> Any:
    config = Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=7,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.bias.data.normal_()
    return model


def made(family: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = family().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(4)  # or attention is to all alike
            elif parameter.mean() == 1:
                parameter.data.uniform_(0.5, 1.5)
    return model


def compared(model: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits through slots with prepared layers, the model's own, and how many layers are in C."""
    prepared = Prepared(model)
    rows = [[(31 * n + 5) % 258 for n in range(size)] for size in (5, 23, 2)]
    with torch.inference_mode(), prepared.in_use():
        found = fallback._in_slots(model, rows)
    with torch.inference_mode():
        expected = fallback._plainly(model, rows)
    return found, expected, sum(isinstance(made, FusedLayer) for _, made in prepared._layers)


@pytest.mark.parametrize("family", [llama, llama_biased, mistral_windowed, qwen2_half_windowed])
def test_layers_in_c_equal_the_models_own(family: Callable[[], Any]) -> None:
    found, expected, count = compared(made(family))
    assert count == 2
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("on", [True, False])
def test_an_adapter_is_part_of_the_products(on: bool) -> None:
    base = made(qwen2_half_windowed)
    plain = compared(base)[1]
    model = get_peft_model(base, LoraConfig(**LORA)).eval()
    lora_linear.fuse(model)
    if not on:
        model.disable_adapter_layers()
    found, expected, count = compared(base)
    assert count == 2
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=5e-5)
    assert torch.allclose(expected, plain) != on


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bfloat16"
)
@pytest.mark.parametrize("adapted", [True, False])
def test_bfloat16_differs_by_rounding(adapted: bool) -> None:
    """No further from the exact logits than twice what the model's own forward pass is."""
    exact_model = made(llama)
    model = made(llama).to(torch.bfloat16)
    if adapted:
        torch.manual_seed(1)
        with_adapter = get_peft_model(model, LoraConfig(**LORA)).eval()
        lora_linear.fuse(with_adapter)
        weights = {k: v.float() for k, v in with_adapter.state_dict().items() if "lora" in k}
        exact = get_peft_model(exact_model, LoraConfig(**LORA)).eval()
        exact.load_state_dict(weights, strict=False)
    found, own, count = compared(model)
    expected = compared(exact_model)[1]
    assert count == 2
    assert (found - expected).pow(2).mean().sqrt() < 2 * (own - expected).pow(2).mean().sqrt()


def test_no_bit_depends_on_the_other_rows_or_the_threads() -> None:
    """Also where rows are not a multiple of any vector, and begin anywhere."""
    torch.manual_seed(0)
    hidden, added = torch.randn(33, 83), torch.randn(33, 83)
    by = layers._Norm(torch.randn(83), 1e-5)
    gate_up = torch.randn(33, 2 * 83)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            together = hidden.clone()
            normed = layers.norm(together, added, by)
            active = layers.silu_times(gate_up)
            for n in range(33):
                row = hidden[n : n + 1].clone()
                assert torch.equal(layers.norm(row, added[n : n + 1], by)[0], normed[n])
                assert torch.equal(row[0], together[n])
                assert torch.equal(layers.silu_times(gate_up[n : n + 1])[0], active[n])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_computed_exactly_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 200).to(dtype), torch.randn(200).to(dtype)
    gate_up = (torch.randn(7, 400) * 30).to(dtype)
    # What is beyond any exponent, and what is no number.
    gate_up[0, :4] = torch.tensor([-1e4, 1e4, float("nan"), -3e38])
    gate_up[:, 200] = 1
    close: Any = {"atol": 1e-6, "rtol": 2e-6 if dtype == torch.float32 else 2**-8 * 1.01}
    normed = functional.rms_norm(hidden.double(), (200,), weight.double(), 1e-5)
    found = layers.norm(hidden, None, layers._Norm(weight, 1e-5)).double()
    torch.testing.assert_close(found, normed, **close)
    gate, up = gate_up.double().chunk(2, dim=1)
    found = layers.silu_times(gate_up).double()
    torch.testing.assert_close(found, functional.silu(gate) * up, equal_nan=True, **close)


def test_layers_of_another_form_are_left_alone() -> None:
    gelu = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    hooked = made(llama)
    hooked.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    replaced = made(llama)
    attention = replaced.model.layers[0].self_attn
    attention.forward = attention.forward
    half = made(llama).to(torch.float16)
    for model, in_c in ((gelu, 0), (hooked, 1), (replaced, 1), (half, 0)):
        assert sum(isinstance(m, FusedLayer) for _, m in Prepared(model)._layers) == in_c


def test_rows_that_do_not_fit_are_the_layers_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of another dtype, heads of which a part is turned, and what is no step of decoding."""
    model = made(llama)
    layer = next(made for _, made in Prepared(model)._layers if isinstance(made, FusedLayer))
    monkeypatch.setattr(type(model.model.layers[0]), "forward", lambda *_, **options: options)
    hidden, whole, part = torch.randn(1, 3, 96), torch.ones(1, 3, 16), torch.ones(1, 3, 8)
    for rows, turned, step in (
        (hidden.bfloat16(), whole.bfloat16(), object()),
        (hidden, whole.double(), object()),
        (hidden, part, object()),
        (hidden, whole, None),
    ):
        options: Any = {"position_embeddings": (turned, turned), "step": step}
        assert layer(rows, **options) == options


def test_without_a_compiler_they_are_torchs_work(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.c_functions.cache_clear()
    layers._rows.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    try:
        found, expected, count = compared(made(llama))
    finally:
        compiled.c_functions.cache_clear()
        layers._rows.cache_clear()
    assert count == 0
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
