"""What `model.dtype: auto` is: by machine, device, tuning, kind of adapter, and the model's layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from prefloop import machine
from prefloop.errors import ModelError
from prefloop.models.dtype import choose_dtype, device_type
from prefloop.models.lora_linear import is_joined
from prefloop.models.policy import Policy, auto_dtype
from prefloop.models.sources import ModelOptions
from tests.conftest import model_options
from tests.models.test_lora_variants import KINDS

CPU = torch.device("cpu")
INT8 = {"quant_type": "Int8WeightOnlyConfig"}
# PEFT reads a property that transformers has renamed, and corrects GPT-2's layers by itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


def automatic(folder: Path, **more: Any) -> ModelOptions:
    return model_options(folder, dtype="auto", **more)


def chosen(device: str = "cpu", obstacle: str | None = None, **options: Any) -> str:
    return choose_dtype(ModelOptions.model_validate(options), device, obstacle).dtype


def test_a_plain_adapter_is_in_bfloat16_where_the_cpu_multiplies_it_fast(cpu: bool) -> None:
    assert chosen() == ("bfloat16" if cpu else "float32")
    assert chosen(lora={"rank_pattern": {"q_proj": 2}}) == chosen()


@pytest.mark.parametrize(
    "options",
    [
        {"tuning": "full"},
        {"lora": {"dropout": 0.1}},
        {"lora": {"use_dora": True}},
        {"lora": {"init_lora_weights": "pissa"}},
        {"lora": {"modules_to_save": ["norm"]}},
        {"lora": {"target_parameters": ["experts.gate_up_proj"]}},
        {"quantization": INT8},
    ],
)
def test_what_bfloat16_would_round_away_stays_in_float32_on_every_cpu(
    cpu: bool, options: dict[str, Any]
) -> None:
    assert chosen(**options) == "float32"
    assert chosen(obstacle="sft") == "float32"


def test_other_devices_and_written_dtypes_are_as_they_were(cpu: bool) -> None:
    assert chosen("cuda") == chosen("cuda", lora={"dropout": 0.1}) == "bfloat16"
    assert chosen("cuda", obstacle="sft") == "bfloat16"
    assert chosen("cuda", tuning="full") == chosen("mps") == "float32"
    for written in ("float32", "bfloat16"):
        assert chosen("cpu", dtype=written) == chosen("cuda", dtype=written) == written


def test_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    decider = "prefloop.models.dtype.multiplies_bfloat16_fast"
    monkeypatch.setattr(decider, lambda: True)
    told = choose_dtype(ModelOptions.model_validate({"lora": {"dropout": 0.1}}), "cpu").in_words()
    assert told.startswith("model.dtype auto is float32 here: model.lora.dropout keeps")
    monkeypatch.setattr(decider, lambda: False)
    assert "no instructions" in choose_dtype(ModelOptions(), "cpu").why


@pytest.mark.parametrize(
    ("onednn", "avx512", "amx", "fast"),
    [
        (True, True, False, True),
        (True, False, True, True),
        (True, False, False, False),
        (False, True, True, False),
    ],
)
def test_a_cpu_is_fast_that_has_the_instructions_and_a_library_that_uses_them(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, avx512: bool, amx: bool, fast: bool
) -> None:
    """Plain AVX-512 (third row) is emulated by oneDNN, which says that it has bfloat16."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert machine.multiplies_bfloat16_fast() is fast


def test_devices_are_known_by_their_kind() -> None:
    assert [device_type(name) for name in ("cpu", "cuda:1")] == ["cpu", "cuda"]
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert device_type("auto") == "cpu"


def joined(policy: Policy) -> set[bool]:
    return {is_joined(m) for m in policy.model.modules() if isinstance(m, LoraLayer)}


@pytest.mark.parametrize("kind", [*KINDS, "plain", "dropout", "some modules", "embedding"])
def test_auto_is_bfloat16_for_the_adapters_that_are_joined_and_no_others(
    fast_cpu: None, model_folder: Path, kind: str
) -> None:
    more: dict[str, Any] = {
        "plain": {},
        "dropout": {"dropout": 0.1},
        "some modules": {"target_modules": r".*\.[qv]_proj"},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    }
    lora = {"r": 4, **(KINDS | more)[kind]}
    policy = Policy.load(automatic(model_folder, lora=lora))
    if policy.model.dtype == torch.bfloat16:
        assert joined(policy) == {True}
        return
    assert policy.model.dtype == torch.float32
    try:
        forced = Policy.load(model_options(model_folder, dtype="bfloat16", lora=lora))
    except (ModelError, ValueError):
        return  # refused in bfloat16
    assert False in joined(forced), "float32 for nothing"


def test_layers_that_cannot_be_joined_are_found_without_a_weight(
    fast_cpu: None, tmp_path: Path, tokenizer: Any, model_folder: Path
) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    size = len(tokenizer)
    mixture = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=size, **heads, **shape, **experts))
    conv = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2))
    for name, model, part in (("moe", mixture, "experts"), ("gpt2", conv, "c_attn")):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        options = automatic(tmp_path / name, lora={"r": 2})
        choice = auto_dtype(options, CPU, tmp_path / name)
        assert choice.dtype == "float32"
        assert part in choice.why
        assert Policy.load(options).model.dtype == torch.float32
    assert auto_dtype(automatic(model_folder), CPU, model_folder).dtype == "bfloat16"
