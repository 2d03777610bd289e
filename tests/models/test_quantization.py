"""Bases in fewer bits: what is refused in words, and, where torchao is installed, that all ways are one."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from prefloop.errors import ModelError, RecipeError
from prefloop.models.policy import ModelOptions, Policy
from prefloop.models.sources import check_quantization
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_recipe
from prefloop.run.self_check import TOLERANCE, check_policy
from prefloop.train.options import TrainOptions
from tests.conftest import model_options
from tests.models.test_lora_variants import logps, train_a_little

INT8 = {"quant_type": "Int8WeightOnlyConfig"}


def options(folder: Path, quantization: dict[str, Any], **more: Any) -> ModelOptions:
    return model_options(folder, quantization=quantization, **more)


@pytest.mark.parametrize(
    ("quantization", "more", "sentence"),
    [
        ({}, {}, "give one of load_in_4bit"),
        ({"load_in_4bit": True, **INT8}, {}, "give one of load_in_4bit"),
        ({**INT8, "bnb_4bit_quant_type": "fp4"}, {}, "bnb_4bit_quant_type has an effect under"),
        (INT8, {"tuning": "full"}, "too few bits to train them; set tuning to lora"),
        (INT8, {"lora": {"use_dora": True}}, "use_dora reads the weights"),
        (INT8, {"lora": {"init_lora_weights": "pissa"}}, "init_lora_weights reads the weights"),
        (INT8, {"lora": {"modules_to_save": ["norm"]}}, "modules_to_save reads the weights"),
    ],
)
def test_what_cannot_go_with_fewer_bits_is_refused(
    quantization: dict[str, Any], more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValidationError, match=sentence):
        options(Path("m"), quantization, **more)


def test_a_missing_package_and_a_missing_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for bits, package in ((INT8, "torchao"), ({"load_in_4bit": True}, "bitsandbytes")):
        said = rf"{package}, which is not installed; pip install 'prefloop\[quantization\]'"
        with pytest.raises(ModelError, match=said):
            check_quantization(options(Path("m"), bits))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    check_quantization(options(Path("m"), INT8))
    for bits in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(ModelError, match=r"need CUDA, and this machine or model.device"):
            check_quantization(options(Path("m"), {bits: True}))


@pytest.mark.parametrize(
    ("section", "value", "sentence"),
    [
        ("sft", {}, "sft merges its adapter into the weights"),
        ("engine", {"name": "vllm"}, "engine 'vllm' answers with the plain weights"),
        ("launch", {"processes": 2, "sharding": "fsdp2"}, "model.quantization needs whole weights"),
    ],
)
def test_check_refuses_what_would_round_once_more(
    monkeypatch: pytest.MonkeyPatch, section: str, value: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr("prefloop.recipe.check.check_quantization", lambda options: None)
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "method": {"name": "arop"},
            "model": {"quantization": INT8},
            section: value,
        }
    )
    with pytest.raises(RecipeError, match=sentence):
        check_recipe(recipe)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_eight_bits_of_torchao_are_one_model_in_all_ways(
    model_folder: Path, tmp_path: Path
) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization",
        reason="needs torchao, which make setup does not install",
        exc_type=ImportError,
    )
    from transformers import TorchAoConfig

    chosen = options(model_folder, INT8)
    policy = Policy.load(chosen)
    before = logps(policy.model)
    base = AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=torch.float32,
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    )
    assert torch.equal(before, logps(base))
    found = check_policy(policy, TrainOptions(), tmp_path)
    del found["moved"]
    assert max(found.values()) <= TOLERANCE
    train_a_little(policy)
    trained = logps(policy.model)
    with policy.merged():
        assert torch.equal(logps(policy.model), trained)
        with policy.at_start():
            assert torch.equal(logps(policy.model), before)
    policy.save(tmp_path / "policy")
    assert torch.equal(logps(Policy.load(chosen, tmp_path / "policy").model), trained)
    alone = PeftModel.from_pretrained(base, str(tmp_path / "policy")).eval()
    torch.testing.assert_close(logps(alone), trained, rtol=0, atol=2e-5)
    with pytest.raises(ModelError, match="rounded once more with it inside"):
        policy.merge()
