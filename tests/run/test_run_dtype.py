"""A run's dtype under `auto`: told and noted when it begins, and kept on whatever machine it goes on."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from prefloop.evaluate.subjects import find_subject, open_subject
from prefloop.recipe import Recipe, initial_source
from prefloop.run.estimate import Told, estimate, model_shape
from prefloop.run.loop import run
from prefloop.run.publish import merge_policy
from prefloop.run.session import Session
from prefloop.run_folder import RunDir, read_run
from tests.run.test_estimate import even
from tests.run.test_loop import LIGHT, recipe

DECIDES = "prefloop.models.dtype.multiplies_bfloat16_fast"


@pytest.fixture(autouse=True)
def without_waiting(without_waiting_for_the_disk: None) -> None:
    """For the disk."""


def automatic(folder: Path, rounds: int = 1, **changes: Any) -> Recipe:
    model = {"dtype": "auto", **changes.pop("model", {})}
    loop = {"rounds": rounds, "prompts_per_round": 4}
    return recipe(folder, "ial", model=model, loop=loop, evaluate=LIGHT, **changes)


def play(chosen: Recipe, folder: Path) -> str:
    out = StringIO()
    run(chosen, folder, Console(file=out, width=300))
    return out.getvalue()


def noted(folder: Path) -> Any:
    return json.loads((folder / "environment.json").read_text())["inputs"].get("model.dtype")


def used(folder: Path) -> str:
    """The dtype in which the run's policy is loaded."""
    found = read_run(folder)
    policy = Session(Recipe.model_validate(_sections(folder)), found).policy_at(None)
    return str(policy.model.dtype).removeprefix("torch.")


def _sections(folder: Path) -> Any:
    import yaml

    return yaml.safe_load((folder / "recipe.yaml").read_text())


@pytest.fixture(scope="module")
def begun_fast(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of one round on a CPU with bfloat16, and what it said."""
    folder = tmp_path_factory.mktemp("fast") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DECIDES, lambda: True)
        patch.setattr("os.fsync", lambda descriptor: None)
        said = play(automatic(model_folder), folder)
    return folder, said


def test_a_run_says_and_notes_its_dtype(begun_fast: tuple[Path, str]) -> None:
    folder, said = begun_fast
    assert said.startswith("model.dtype auto is bfloat16 here: ")
    assert noted(folder) == used(folder) == "bfloat16"
    assert [e["dtype"] for e in read_run(folder).events() if e["event"] == "dtype"] == ["bfloat16"]


@pytest.mark.parametrize("began", [True, False], ids=["fast", "slow"])
def test_a_run_goes_on_in_the_dtype_in_which_it_began(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model_folder: Path,
    tmp_path: Path,
    began: bool,
) -> None:
    """Killed before its training, and called again on a CPU of the other kind: the same bytes."""
    chosen, dtype = automatic(model_folder), "bfloat16" if began else "float32"
    monkeypatch.setattr(DECIDES, lambda: began)
    play(chosen, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "train", _killed)
        with pytest.raises(KeyboardInterrupt):
            play(chosen, tmp_path / "moved")
    monkeypatch.setattr(DECIDES, lambda: not began)
    said = play(chosen, tmp_path / "moved")
    assert "model.dtype" not in said
    assert f"the run goes on in {dtype}, as it began" in caplog.text
    assert noted(tmp_path / "moved") == used(tmp_path / "moved") == dtype
    ends = [tmp_path / name / "policy/adapter_model.safetensors" for name in ("whole", "moved")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_from_before_dtypes_were_noted_goes_on_in_float32(
    fast_cpu: None, model_folder: Path, begun_fast: tuple[Path, str], tmp_path: Path
) -> None:
    chosen, folder = automatic(model_folder), tmp_path / "run"
    shutil.copytree(begun_fast[0], folder)
    # As an earlier version would have left it.
    from prefloop.manifest import read_sealed, sealed

    path = folder / "environment.json"
    facts = read_sealed(path, "")
    del facts["inputs"]["model.dtype"]
    path.write_text(sealed(facts))
    assert initial_source(chosen, RunDir(folder)).dtype == "float32"
    facts["inputs"]["device"] = "NVIDIA H200"
    path.write_text(sealed(facts))
    on_gpu = chosen.model_copy(update={"model": chosen.model.model_copy(update={"device": "auto"})})
    assert initial_source(on_gpu, RunDir(folder)).dtype == "bfloat16"
    assert initial_source(chosen, RunDir(folder)).dtype == "float32", "model.device: cpu"
    facts["inputs"]["device"] = "cpu"
    path.write_text(sealed(facts))
    play(chosen, folder)
    assert noted(folder) == "float32"


def test_an_evaluation_loads_a_run_as_it_was_trained(
    monkeypatch: pytest.MonkeyPatch, begun_fast: tuple[Path, str]
) -> None:
    folder, hashes = begun_fast[0], set()
    for fast in (True, False):
        monkeypatch.setattr(DECIDES, lambda fast=fast: fast)
        for name in (str(folder), f"{folder}@0", f"{folder}@start"):
            with open_subject(find_subject(name), None) as subject:
                assert subject.model.dtype == torch.bfloat16
        hashes.add(find_subject(str(folder)).weights_hash())
    assert len(hashes) == 1, "what was measured there holds here"


def test_a_merged_model_keeps_what_bfloat16_would_round_away(
    begun_fast: tuple[Path, str], tmp_path: Path
) -> None:
    merged = merge_policy(begun_fast[0], tmp_path / "merged")
    with safe_open(merged / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118


@pytest.mark.parametrize(
    "changes",
    [
        {"sft": {"epochs": 1, "batch_size": 4}},
        {"launch": {"processes": 2, "sharding": "fsdp2"}},
        {"model": {"lora": {"dropout": 0.1}}},
        {"model": {"tuning": "full"}},
    ],
)
def test_an_estimate_and_a_run_choose_alike(
    fast_cpu: None, model_folder: Path, changes: dict[str, Any]
) -> None:
    plain = automatic(model_folder)
    assert model_shape(plain).dtype == "bfloat16"
    assert "products in bfloat16" in estimate(plain, even).lines()[-1]
    assert model_shape(automatic(model_folder, **changes)).dtype == "float32"


def test_an_estimate_for_gpus_is_in_their_dtype(cpu: bool, model_folder: Path) -> None:
    """Whatever this machine's CPU multiplies."""
    found = estimate(automatic(model_folder), even, told=Told(device="cuda"))
    assert found.dtype == "bfloat16"
