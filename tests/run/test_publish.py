"""What leaves a run fits elsewhere: cards that open what lies beside them, bases that others have, ordinary modes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloop.models.policy import Policy
from prefloop.models.sources import EMBEDDED, ModelOptions
from prefloop.run.publish import (
    OLDEST_PEFT,
    OLDEST_PEFT_EXPERTS,
    OLDEST_TRANSFORMERS,
    merge_policy,
    opens_with,
    publish,
)
from prefloop.run_folder import Outcome, read_run
from tests.conftest import model_options
from tests.run.test_loop import play, recipe

peft_calls_the_old_name = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated")


@pytest.fixture(scope="module")
def outcome(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run of one round."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return play(recipe(model_folder, "ial", loop={"rounds": 1}), folder)


def opened_as_its_card_says(folder: Path) -> Any:
    """The model, by the class that the card's example names."""
    card = ModelCard.load(folder / "README.md")
    classes = {
        "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM,
        "AutoModelForCausalLM": AutoModelForCausalLM,
    }
    (named,) = (name for name in classes if f"{name}.from_pretrained" in card.text)
    return classes[named].from_pretrained(folder, dtype=torch.float32)


def logits(model: Any, folder: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)("Where does it end?", return_tensors="pt")
    with torch.no_grad():
        return model(ids["input_ids"]).logits  # type: ignore[no-any-return]


@peft_calls_the_old_name
def test_an_adapter_and_its_merged_model_open_as_their_cards_say_and_are_one_policy(
    outcome: Outcome, tmp_path: Path
) -> None:
    merged = merge_policy(outcome.folder, tmp_path / "merged")
    models = [opened_as_its_card_says(folder) for folder in (outcome.policy, merged)]
    of_adapter, of_merged = (logits(model, merged) for model in models)
    torch.testing.assert_close(of_adapter, of_merged, atol=1e-5, rtol=1e-5)


def test_a_merged_model_may_have_a_gguf_file_beside_it(outcome: Outcome, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra embedded, which make setup installs")
    merged = merge_policy(outcome.folder, tmp_path / "merged", gguf="f16")
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(
        merged, gguf_file="merged-f16.gguf", dtype=torch.float32
    )
    found, expected = logits(again, merged), logits(plain, merged)
    assert (found - expected).abs().max() < 0.01 * expected.std()
    assert sorted(path.suffix for path in merged.iterdir() if path.suffix == ".gguf") == [".gguf"]


def test_a_merged_models_card_speaks_of_a_whole_model(outcome: Outcome, tmp_path: Path) -> None:
    merged = ModelCard.load(merge_policy(outcome.folder, tmp_path / "merged") / "README.md")
    adapter = ModelCard.load(outcome.policy / "README.md")
    libraries = [card.data.to_dict()["library_name"] for card in (merged, adapter)]
    assert libraries == ["transformers", "peft"]
    assert "A LoRA adapter, merged into" in merged.text
    assert f"Opens with peft {OLDEST_PEFT} or newer." in adapter.text
    assert "peft" not in merged.text.partition("## How it was made")[0]
    assert f"Opens with transformers {OLDEST_TRANSFORMERS} or newer." in merged.text
    measures = [
        card.text.partition("## Measures")[2].partition("##")[0] for card in (merged, adapter)
    ]
    assert measures[0] == measures[1] != ""


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("adapter_config.json", {"target_parameters": None}, f"peft {OLDEST_PEFT} or newer."),
        (
            "adapter_config.json",
            {"target_parameters": ["down_proj"]},
            f"peft {OLDEST_PEFT_EXPERTS}",
        ),
        ("config.json", {"rope_parameters": {"rope_theta": 5e5}}, "transformers 5.0 or newer."),
        ("config.json", {"model_type": "gpt2"}, None),
    ],
)
def test_a_card_says_from_which_versions_on_a_folder_is_read_right(
    tmp_path: Path, file: str, values: dict[str, Any], sentence: str | None
) -> None:
    (tmp_path / file).write_text(json.dumps(values))
    said = opens_with(tmp_path)
    assert said.startswith(f"Opens with {sentence}") if sentence else said == ""


def test_the_adapter_of_an_embedded_model_names_the_hubs(
    outcome: Outcome, model_folder: Path
) -> None:
    run = read_run(outcome.folder)
    tiny = recipe(model_folder, "ial")
    shipped = tiny.model_copy(update={"model": ModelOptions(source="embedded:smollm2-135m")})
    before = json.loads((run.round(0).policy / "adapter_config.json").read_text())
    policy = publish(shipped, run, run.round(0), outcome.results)
    config = json.loads((policy / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {**config, "base_model_name_or_path": before["base_model_name_or_path"]} == before
    text = (policy / "README.md").read_text(encoding="utf-8")
    assert EMBEDDED["smollm2-135m"].about in text
    publish(tiny, run, run.round(0), outcome.results)
    assert str(model_folder) in (policy / "adapter_config.json").read_text()


def test_an_adapters_modules_stand_in_order(outcome: Outcome) -> None:
    config = json.loads((outcome.policy / "adapter_config.json").read_text())
    assert len(config["target_modules"]) > 5
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_a_saved_policy_may_be_read_by_whom_the_umask_lets(
    model_folder: Path, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        Policy.load(model_options(model_folder)).save(tmp_path / "policy")
    finally:
        os.umask(before)
    found = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "policy", *(tmp_path / "policy").iterdir())
    }
    assert found.pop("policy") == 0o777 & ~umask
    assert "adapter_model.safetensors" in found
    assert set(found.values()) == {0o666 & ~umask}
