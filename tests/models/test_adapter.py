"""Which weights get an adapter, and that what is refused would have been another policy."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import AddedToken
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from prefloop.errors import ModelError
from prefloop.models.policy import Policy
from prefloop.models.sources import LoraOptions, ModelOptions
from tests.conftest import trainable_weights

SMALL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS: dict[str, Any] = {**SMALL, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
IDS = torch.tensor([[5, 9, 33, 70, 12]])


def dense(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "tie_word_embeddings": False, **more}))


def mixture() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**EXPERTS, num_experts=4))


def with_shared_experts() -> DeepseekV3ForCausalLM:
    """The first layer dense, the second with experts and a shared one."""
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    sizes: dict[str, Any] = {**EXPERTS, **ranks, "v_head_dim": 8, "num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **sizes, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1
        )
    )


def with_images() -> Gemma3ForConditionalGeneration:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**SMALL, "layer_types": ["full_attention"] * 2},
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=263,
            boi_token_index=261,
            eoi_token_index=262,
        )
    )


@pytest.fixture
def load(tmp_path: Path, tokenizer: Any) -> Any:
    """Load a model's policy with these LoRA options."""

    usual = tokenizer

    def load(model: Any, *, dtype: str = "float32", tokenizer: Any = usual, **lora: Any) -> Policy:
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return Policy.load(options(tmp_path, dtype, **lora))

    return load


def options(folder: Path, dtype: str = "float32", **lora: Any) -> ModelOptions:
    source = str(folder / "base")
    return ModelOptions.model_validate(
        {"source": source, "device": "cpu", "dtype": dtype, "lora": {"r": 4, **lora}}
    )


def trained_names(policy: Policy) -> str:
    return " ".join(n for n, w in policy.model.named_parameters() if w.requires_grad)


def disturb(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in trainable_weights(policy):
            weight += 0.2 * torch.randn(weight.shape, generator=generator)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def assert_is_one_policy(policy: Policy, again: Any) -> None:
    """Trained, merged, saved, and merged for good."""
    initial = logits(policy.model)
    disturb(policy)
    expected = logits(policy.model)
    assert (expected - initial).abs().max() > 0.1 * initial.std()
    with policy.merged():
        torch.testing.assert_close(logits(policy.model), expected, rtol=1e-3, atol=1e-4)
        with policy.at_start():
            assert torch.equal(logits(policy.model), initial)
    assert torch.equal(logits(policy.model), expected)
    with policy.at_start():
        assert torch.equal(logits(policy.model), initial)
    opened = again(policy)
    assert torch.equal(logits(opened.model), expected)
    torch.testing.assert_close(logits(opened.merge()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("made", "lora"),
    [
        (dense, {"use_rslora": True}),
        (dense, {"modules_to_save": ["lm_head"]}),
        (dense, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        (mixture, {}),
        (with_shared_experts, {}),
        (with_images, {}),
    ],
)
def test_trained_merged_and_saved_are_one_policy(
    load: Any, tmp_path: Path, made: Any, lora: dict[str, Any]
) -> None:
    def again(policy: Policy) -> Policy:
        policy.save(tmp_path / "policy")
        return Policy.load(options(tmp_path, **lora), tmp_path / "policy")

    assert_is_one_policy(load(made(), **lora), again)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_tied_embeddings_with_an_adapter_are_refused(load: Any, lora: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"tied embeddings.*leave it out"):
        load(dense(tie_word_embeddings=True), **lora)


def test_stacked_experts_are_adapted_and_the_share_is_said(load: Any) -> None:
    share = load(mixture()).share()
    assert share.modules[:2] == ("experts.down_proj", "experts.gate_up_proj")
    head_and_table = 2 * 264 * 32
    assert share.under_adapter > 0.9 * (share.weights - head_and_table)
    assert "experts.down_proj" in share.in_words()


def test_experts_can_be_left_out(load: Any) -> None:
    policy = load(mixture(), target_parameters=[])
    assert "experts" not in trained_names(policy)
    assert "q_proj" in trained_names(policy)


def test_a_shared_expert_and_a_dense_layer_are_adapted_too(load: Any) -> None:
    names = trained_names(load(with_shared_experts()))
    for module in ("layers.0.mlp.gate_proj", "layers.1.mlp.shared_experts.down_proj"):
        assert f"{module}.lora_A" in names
    assert "layers.1.mlp.experts" in names


def test_the_vision_tower_gets_no_adapter(load: Any) -> None:
    names = trained_names(load(with_images()))
    assert "language_model.layers.1.mlp.up_proj" in names
    assert "vision" not in names


def test_excluded_modules_get_no_adapter(load: Any) -> None:
    names = trained_names(load(dense(), exclude_modules=["q_proj", "layers.0.mlp.up_proj"]))
    assert "q_proj" not in names
    assert "layers.0.mlp.up_proj" not in names
    assert "layers.1.mlp.up_proj" in names


def test_parameters_that_do_not_exist_are_refused(load: Any) -> None:
    with pytest.raises(ModelError, match=r"target_parameters 'experts\.w1' is no parameter"):
        load(mixture(), target_parameters=["experts.w1"])


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_layer_is_refused(load: Any, option: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(dense(), **{option: {"q_proj": 2, "layers.5": 3}})
    assert str(caught.value) == (
        f"model.lora.{option} 'layers.5' matches no layer of the adapter; its layers have names such as "
        "model.layers.0.self_attn.q_proj and model.layers.1.mlp.down_proj, of which a key is the ending or a "
        "pattern"
    )


def test_a_pattern_behind_one_that_matches_all_its_layers_is_refused(load: Any) -> None:
    with pytest.raises(ModelError, match=r"'q_proj' has no effect, as '\.\*_proj' comes before it"):
        load(dense(), rank_pattern={".*_proj": 2, "q_proj": 8})
    load(dense(), rank_pattern={"q_proj": 8, ".*_proj": 2})


def test_a_pattern_reaches_the_experts_by_their_parameters_name(load: Any) -> None:
    policy = load(mixture(), rank_pattern={"experts.down_proj": 2, "q_proj": 3})
    shapes = {n: w.shape for n, w in policy.model.named_parameters() if "lora_A" in n}
    ranks = {size for name, shape in shapes.items() if "experts" in name for size in shape[:1]}
    assert ranks == {4 * 4, 2 * 4}
    assert {shape[0] for name, shape in shapes.items() if "q_proj" in name} == {3}
    with pytest.raises(ModelError, match=r"'experts' matches no layer of the adapter"):
        load(mixture(), rank_pattern={"experts": 2})


def test_what_is_no_pattern_is_refused_where_options_are_read() -> None:
    for option, value in (
        ("rank_pattern", {"layers.(0": 2}),
        ("alpha_pattern", {"*q": 2}),
        ("alpha_pattern", {"(?i)q_proj": 2}),
        ("exclude_modules", "(q"),
    ):
        with pytest.raises(ValidationError, match=rf"{option}[\s\S]*is no regular expression"):
            LoraOptions.model_validate({option: value})


def test_dropout_on_experts_is_refused_with_both_remedies(load: Any) -> None:
    with pytest.raises(ModelError, match=r"set it to 0, or model\.lora\.target_parameters to \[\]"):
        load(mixture(), dropout=0.1)
    load(mixture(), dropout=0.1, target_parameters=[])


def test_whole_modules_are_not_trained_in_half_precision(load: Any) -> None:
    with pytest.raises(ModelError, match=r"set model\.dtype to float32"):
        load(dense(), dtype="bfloat16", modules_to_save=["lm_head"])


def test_names_are_saved_in_order(load: Any, tmp_path: Path) -> None:
    load(with_shared_experts()).save(tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    for field in ("target_modules", "target_parameters"):
        assert len(config[field]) > 1
        assert config[field] == sorted(config[field])


def test_a_token_without_a_row_in_the_embedding_is_named(load: Any, tokenizer: Any) -> None:
    # <|im_start|> and <|im_end|> are the first ids here, so the last bytes have no row.
    with pytest.raises(ModelError, match=r"has 258 tokens and the model's embedding 250 rows"):
        load(dense(vocab_size=250))


def test_special_tokens_without_a_row_are_allowed_where_no_template_uses_them(
    load: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([AddedToken("<|image|>", special=True)], special_tokens=True)
    load(dense(vocab_size=len(tokenizer)), tokenizer=longer)
    assert "<|image|> ..." in caplog.text
