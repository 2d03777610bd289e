"""Randomly initialised models in the shapes of SmolLM2, and a byte tokenizer: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from prefloop.models import lora_linear
from prefloop.models.adapter import lora_config
from prefloop.models.policy import ModelOptions, Policy
from tests import shapes

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1.7b": {
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
"""SmolLM2-135M, SmolLM2-1.7B, and one for CPUs with the first one's ratio of heads."""


def random_policy(
    shape: str, device: str, dtype: torch.dtype, *, adapter: bool = True, noise: float = 0.0
) -> Policy:
    """A policy with weights drawn by a fixed seed. `noise`: of LoRA's second matrix, which is 0 in a fresh adapter."""
    tokenizer = shapes.byte_level(
        shapes.CHATML,
        ["<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|im_start|>",
    )
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    options = ModelOptions(source=f"random-{shape}", device=device, dtype=name)
    torch.manual_seed(0)
    with torch.device(device):
        # Casting afterwards would round the rotary frequencies too.
        model: Any = LlamaForCausalLM._from_config(config, dtype=dtype)
        if adapter:
            model = get_peft_model(
                model, lora_config(model, options.lora, task_type="CAUSAL_LM", inference_mode=False)
            )
            lora_linear.fuse(model)
    if noise:
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=noise)
    return Policy(model.to(device).train(), tokenizer, options)
