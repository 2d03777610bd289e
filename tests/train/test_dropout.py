"""Training computes without the base model's dropout, and with the adapter's own."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from prefloop.train.dropout import without_dropout

IDS = torch.tensor([[3, 7, 1, 9, 4, 4, 2]])


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2))


def opt() -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 20,
        "hidden_size": 16,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    }
    return OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))


def phi() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24}
    noise = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3}
    return PhiForCausalLM(PhiConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, **noise))


def falcon() -> Any:
    """Its layers read the rates from the configuration."""
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2}
    noise = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
    return FalconForCausalLM(FalconConfig(**sizes, num_attention_heads=2, **noise))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("made", [gpt2, opt, phi, falcon])
def test_a_model_in_training_mode_computes_as_in_evaluation(made: Any) -> None:
    torch.manual_seed(0)
    model = made()
    expected = logits(model.eval())
    model.train()
    noisy = [logits(model) for _ in range(2)]
    assert not torch.equal(*noisy)
    with without_dropout(model):
        assert model.training
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated")
def test_the_adapters_own_dropout_stays() -> None:
    torch.manual_seed(0)
    lora = LoraConfig(
        r=2,
        lora_dropout=0.5,
        target_modules=["c_attn"],
        init_lora_weights=False,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(gpt2(), lora).train()
    with without_dropout(model):
        assert not torch.equal(logits(model), logits(model))
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(model))
