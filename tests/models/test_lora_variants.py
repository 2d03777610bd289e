"""Kinds of adapters, each against PEFT's own forward on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from prefloop.errors import ModelError
from prefloop.generate.hf_engine import HFEngine
from prefloop.models.policy import LoraOptions, ModelOptions, Policy
from prefloop.run.self_check import TOLERANCE, check_policy
from prefloop.train.options import TrainOptions
from tests.conftest import byte_tokenizer, model_options, trainable_weights

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "pissa_rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
    "olora_whole_modules": {"init_lora_weights": "olora", "modules_to_save": ["norm"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "pissa_patterns": {
        "init_lora_weights": "pissa",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 3},
    },
}
IDS = torch.tensor([[5, 9, 33, 70, 12, 1], [8, 8, 41, 2, 90, 17]])
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


def options(folder: Path, **lora: Any) -> ModelOptions:
    return model_options(folder, lora={"r": 4, "alpha": 6, **lora})


def logps(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits.log_softmax(-1)
    return found


def train_a_little(policy: Policy) -> None:
    """Every trained weight moves by gradients, as in training."""
    optimizer = torch.optim.SGD(trainable_weights(policy), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        policy.model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(weight.grad is not None for weight in trainable_weights(policy))
        optimizer.step()


@every_kind
def test_peft_alone_opens_what_is_saved_as_the_same_model(
    model_folder: Path, tmp_path: Path, kind: str
) -> None:
    policy = Policy.load(options(model_folder, **KINDS[kind]))
    before = logps(policy.model)
    train_a_little(policy)
    policy.save(tmp_path / "policy")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.testing.assert_close(before, logps(base), rtol=0, atol=2e-5)
    opened = PeftModel.from_pretrained(base, str(tmp_path / "policy")).eval()
    trained = logps(policy.model)
    assert (trained - before).abs().max() > 0.01
    torch.testing.assert_close(logps(opened), trained, rtol=0, atol=2e-5)
    torch.testing.assert_close(logps(policy.merge()), trained, rtol=0, atol=2e-5)


@every_kind
def test_the_initial_policy_is_the_one_that_training_began_with_to_the_bit(
    model_folder: Path, kind: str
) -> None:
    policy = Policy.load(options(model_folder, **KINDS[kind]))
    before = logps(policy.model)
    with policy.at_start():
        assert torch.equal(logps(policy.model), before)
    train_a_little(policy)
    trained, weights = logps(policy.model), [w.clone() for w in policy.model.parameters()]
    with policy.at_start():
        assert torch.equal(logps(policy.model), before)
    with policy.merged():
        torch.testing.assert_close(logps(policy.model), trained, rtol=0, atol=2e-5)
        with policy.at_start():
            torch.testing.assert_close(logps(policy.model), before, rtol=0, atol=2e-5)
        torch.testing.assert_close(logps(policy.model), trained, rtol=0, atol=2e-5)
    assert torch.equal(logps(policy.model), trained)
    assert all(map(torch.equal, policy.model.parameters(), weights))


@every_kind
def test_an_engine_that_was_kept_scores_as_a_new_one_whatever_the_adapter_is_doing(
    model_folder: Path, kind: str
) -> None:
    """Keys and reordered weights of the policy as it was a moment ago must not be used."""
    policy = Policy.load(options(model_folder, **KINDS[kind]))
    rows, starts = [list(range(5, 60))], [20]
    kept = HFEngine(policy.model, policy.tokenizer)

    def scores() -> list[float]:
        found = kept.score_tokens(rows, starts)
        assert found == HFEngine(policy.model, policy.tokenizer).score_tokens(rows, starts)
        return found[0].logprobs

    before = scores()
    train_a_little(policy)
    trained = scores()
    assert trained != pytest.approx(before, abs=1e-3)
    with policy.at_start():
        # Without DoRA's adapter the layers have the form that C computes, and other last bits.
        assert scores() == (pytest.approx(before, abs=1e-5) if kind == "dora" else before)
    with policy.merged():
        assert scores() == pytest.approx(trained, abs=1e-4)
        with policy.at_start():
            assert scores() == pytest.approx(before, abs=1e-4)
        assert scores() == pytest.approx(trained, abs=1e-4)
    assert scores() == trained


@every_kind
def test_a_reopened_policy_has_every_bit_and_trains_on_alike(
    model_folder: Path, tmp_path: Path, kind: str
) -> None:
    policy = Policy.load(options(model_folder, **KINDS[kind]))
    train_a_little(policy)
    policy.save(tmp_path / "policy")
    again = Policy.load(policy.options, tmp_path / "policy")
    assert all(map(torch.equal, again.model.parameters(), policy.model.parameters()))
    for one in (policy, again):
        train_a_little(one)
    assert torch.equal(logps(again.model), logps(policy.model))
    with policy.at_start(), again.at_start():
        assert torch.equal(logps(again.model), logps(policy.model))


@every_kind
def test_the_self_check_passes_and_leaves_every_weight(
    model_folder: Path, tmp_path: Path, kind: str
) -> None:
    policy = Policy.load(options(model_folder, **KINDS[kind]))
    before = [weight.clone() for weight in policy.model.parameters()]
    found = check_policy(policy, TrainOptions(), tmp_path)
    assert found.pop("moved") > 20 * TOLERANCE
    assert max(found.values()) <= TOLERANCE
    assert all(map(torch.equal, policy.model.parameters(), before))


def test_a_bfloat16_base_under_dora_begins_as_itself(model_folder: Path) -> None:
    chosen = options(model_folder, use_dora=True).model_copy(update={"dtype": "bfloat16"})
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    assert torch.equal(logps(Policy.load(chosen).model), logps(base))


def test_parts_of_weights_that_cannot_be_taken_exactly_are_refused(model_folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"splits 40 parts off .* whose smaller side has 32; lower"
    ):
        Policy.load(options(model_folder, r=40, init_lora_weights="olora"))
    with pytest.raises(ValidationError, match="what is left would be rounded to bfloat16"):
        ModelOptions(dtype="bfloat16", lora=LoraOptions(init_lora_weights="pissa"))


def test_only_linear_layers_can_be_split(model_folder: Path) -> None:
    both = ["embed_tokens", "q_proj"]
    with pytest.raises(ModelError, match=r"splits linear layers only, and .*embed_tokens is none"):
        Policy.load(options(model_folder, target_modules=both, init_lora_weights="pissa"))


def test_a_split_adapter_that_is_damaged_or_of_other_options_is_named(
    model_folder: Path, tmp_path: Path
) -> None:
    chosen = options(model_folder, target_modules=["q_proj"], init_lora_weights="olora")
    Policy.load(chosen).save(tmp_path / "policy")
    for lora, sentence in (
        ({"target_modules": ["q_proj", "k_proj"]}, r"has none at .*k_proj; load it with its own"),
        ({"target_modules": ["q_proj"], "r": 8}, r"has rank 8 at .*q_proj"),
    ):
        other = options(model_folder, init_lora_weights="olora", **lora)
        with pytest.raises(ModelError, match=sentence):
            Policy.load(other, tmp_path / "policy")
    weights = tmp_path / "policy/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"policy does not fit .*file not fully covered"):
        Policy.load(chosen, tmp_path / "policy")


def test_weights_that_lie_transposed_are_split_by_pissa_and_refused_for_olora(
    tmp_path: Path,
) -> None:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    policy = Policy.load(options(tmp_path / "gpt2", init_lora_weights="pissa"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", dtype=torch.float32)
    torch.testing.assert_close(logps(policy.model), logps(base), rtol=0, atol=2e-5)
    train_a_little(policy)
    policy.save(tmp_path / "policy")
    again = Policy.load(policy.options, tmp_path / "policy")
    assert torch.equal(logps(again.model), logps(policy.model))
    opened = PeftModel.from_pretrained(base, str(tmp_path / "policy")).eval()
    torch.testing.assert_close(logps(opened), logps(policy.model), rtol=0, atol=2e-5)
    with pytest.raises(ModelError, match=r"olora does not fit .* transposed; take pissa"):
        Policy.load(options(tmp_path / "gpt2", init_lora_weights="olora"))


@pytest.mark.parametrize("value", [False, "eva", "loftq", "pissa_niter_0", "orthogonal", 1.5])
def test_beginnings_at_another_model_are_refused(value: object) -> None:
    with pytest.raises(ValidationError, match=r"none of true, gaussian, pissa|valid"):
        LoraOptions.model_validate({"init_lora_weights": value})


def test_combinations_without_an_exact_form_are_refused() -> None:
    with pytest.raises(ValidationError, match="use_dora with init_lora_weights pissa has no exact"):
        LoraOptions(use_dora=True, init_lora_weights="pissa")
    with pytest.raises(ValidationError, match="cannot be applied to target_parameters"):
        LoraOptions(use_dora=True, target_parameters=["experts.up_proj"])


def test_a_rank_on_disk_counts_what_was_split_off() -> None:
    assert LoraOptions(r=8, rank_pattern={"q_proj": 12}).saved_rank == 12
    assert LoraOptions(r=8, init_lora_weights="olora").saved_rank == 16
