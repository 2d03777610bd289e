"""Shared work: what is shared, that it is exactly what the cell would have made, and what is never shared."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefloop.compare.file import Cell, Comparison, cells
from prefloop.compare.reuse import stage_keys
from prefloop.compare.run import play
from prefloop.errors import PrefloopError
from prefloop.recipe import Recipe
from prefloop.run.loop import run

OPEN = {"cut_off": False, "identical": False, "meta_talk": False}
SHORT = {"max_new_tokens": 6}


def base(model: Path) -> dict[str, Any]:
    return {
        "model": {"source": str(model), "device": "cpu", "dtype": "float32"},
        "method": {"name": "ial", "sampling": SHORT, "advice": SHORT, "gates": OPEN},
        "judge": {"name": "similarity"},
        "data": {"limit": 8},
        "generate": {"chunk_size": 2},
        "loop": {"rounds": 1, "prompts_per_round": 4},
        "sft": {"batch_size": 4, "lr": 1e-3},
        "train": {"epochs": 2, "lr": 1e-3, "batch_size": 4, "micro_batch_size": 2},
        "evaluate": {"prompts": 2, "sampling": SHORT, "every_round": False},
        "guard": {"min_stop_rate": 0.0},
    }


class Ended:
    """A cell that was played, in this process."""

    def __init__(self, cell: Cell, jobs: int = 1) -> None:
        try:
            run(cell.recipe, cell.folder, Console(file=StringIO()))
            self.code = 0
        except PrefloopError as error:
            (cell.folder / "console.log").write_text(f"prefloop: {error}\n")
            self.code = 2

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        raise AssertionError("it has ended")

    def wait(self, timeout: float | None = None) -> int:
        return self.code


def what_counts(folder: Path) -> dict[str, bytes]:
    """Records, measures, training metrics and weights."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".jsonl", ".safetensors") and path.name != "events.jsonl"
    }


def shared(folder: Path) -> list[tuple[str, str, str]]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    found = [line for line in lines if line["event"] == "shared"]
    return [(line["round"], line["stage"], Path(line["origin"]).parent.name) for line in found]


@pytest.fixture(scope="module")
def played(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    folder = tmp_path_factory.mktemp("comparison")
    comparison = Comparison(
        base=base(model_folder),
        seeds=(0,),
        variants={"ial": {}, "eta-1": {"method.eta": 1.0}, "drafts": {"method.advisor": False}},
    )
    found, _ = cells(comparison, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        assert play(found, jobs=1, say=lambda line: None, start=Ended) == {}
    return found


def test_a_variant_of_the_loss_takes_over_all_that_comes_before_it(played):
    assert shared(played[0].folder) == []
    assert shared(played[1].folder) == [
        ("start", "sft", "ial"),
        ("start", "answers", "ial"),
        ("start", "introspection", "ial"),
        ("0000", "candidates", "ial"),
        ("0000", "ranked", "ial"),
    ]


def test_a_variant_of_generation_takes_over_the_start_and_writes_its_own_text(played):
    assert shared(played[2].folder) == [("start", "sft", "ial"), ("start", "answers", "ial")]


@pytest.mark.parametrize("number", [1, 2])
def test_a_cell_with_shared_work_equals_the_same_cell_run_alone(
    played, number, tmp_path, monkeypatch
):
    """Byte for byte: records, pairs, measures, training metrics, weights."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    cell = played[number]
    run(cell.recipe, tmp_path / "alone", Console(file=StringIO()))
    alone, ours = what_counts(tmp_path / "alone"), what_counts(cell.folder)
    assert ours.keys() == alone.keys()
    assert [name for name in ours if ours[name] != alone[name]] == []
    assert "rounds/0000/pairs.jsonl" in ours
    assert "policy/adapter_model.safetensors" in ours
    for manifest in ("start/sft", "start/answers", "0000/candidates", "0000/ranked"):
        one, other = (
            json.loads((folder / f"rounds/{manifest}.done.json").read_text())
            for folder in (cell.folder, tmp_path / "alone")
        )
        for lasting in ("seconds", "peak_memory_mb", "seal"):
            del one[lasting], other[lasting]
        assert one == other


def test_the_variants_do_differ(played):
    first, eta = (what_counts(cell.folder) for cell in played[:2])
    ranked, weights = "rounds/0000/ranked.jsonl", "rounds/0000/policy/adapter_model.safetensors"
    assert first[ranked] == eta[ranked]
    assert first[weights] != eta[weights]


def keys(model: str = "m", **changes: Any) -> dict[str, str]:
    values = {**base(Path(model)), "name": "x", "seed": 0}
    for key, value in changes.items():
        section, _, option = key.partition("__")
        values[section] = {**values[section], option: value} if option else value
    return stage_keys(Recipe.model_validate(values))


def equal(**changes: Any) -> set[str]:
    """Stages that two recipes share if these options differ."""
    one, other = keys(), keys(**changes)
    return {stage for stage in one if one[stage] == other.get(stage)}


ALL = {"sft", "answers", "introspection", "candidates", "ranked"}


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"name": "y"}, ALL),
        ({"method__gamma": 1.0}, ALL),
        ({"method__eta": 0.2}, ALL),
        ({"method__reference": "initial"}, ALL),
        ({"method__gates": {**OPEN, "identical": True}}, ALL),
        ({"loop__rounds": 3}, ALL),
        ({"guard__max_kl": 1.0}, ALL),
        ({"loop__prompts_per_round": 2}, {"sft", "answers", "introspection"}),
        ({"evaluate__prompts": 1}, {"sft", "candidates", "ranked"}),
        ({"evaluate__sampling": {"max_new_tokens": 5}}, ALL - {"answers", "introspection"}),
        ({"method__sampling": {"max_new_tokens": 5}}, {"sft", "answers"}),
        ({"method__generator": "frozen"}, {"sft", "answers"}),
        ({"method__prompt_set": "paper"}, {"sft"}),
        ({"judge": {"name": "rules", "max_words": 5}}, {"sft"}),
        ({"seed": 1}, set()),
        ({"model__source": "other"}, set()),
        ({"model__lora": {"r": 4}}, set()),
        ({"data__limit": 7}, set()),
        ({"generate__chunk_size": 4}, set()),
        ({"sft__lr": 2e-3}, set()),
        ({"train__weight_decay": 0.1}, set()),  # supervised fine-tuning takes it too
        ({"sft": None}, set()),
        ({"engine": {"name": "fake"}}, set()),
        ({"launch": {"processes": 2}}, set()),
    ],
)
def test_what_may_enter_a_stage_is_in_its_key(changes, stages):
    if "seed" in changes or "name" in changes or changes.get("sft", 0) is None:
        values = {**base(Path("m")), "name": "x", "seed": 0}
        one, other = (stage_keys(Recipe.model_validate({**values, **c})) for c in ({}, changes))
        assert {s for s in one if one[s] == other.get(s)} == stages
        return
    assert equal(**changes) == stages


def test_without_supervised_fine_tuning_training_options_enter_nothing_that_is_shared():
    values = {**base(Path("m")), "name": "x", "seed": 0, "sft": None}
    one, other = (
        stage_keys(Recipe.model_validate({**values, "train": {**values["train"], "lr": rate}}))
        for rate in (1e-3, 1e-4)
    )
    assert one == other


def test_arop_without_a_margin_shares_its_text_and_not_its_ratings():
    arop = {"name": "arop", "sampling": SHORT, "gates": OPEN}
    one = keys(method=arop)
    other = keys(method={**arop, "margin": {"kind": "fixed", "m": 0.0}})
    assert {s for s in one if one[s] == other[s]} == {"sft", "answers", "candidates"}


def test_rejects_of_later_stages_are_not_taken_over(model_folder, tmp_path, monkeypatch):
    """The donor's file goes on after the shared stages; the cell's must not begin with what follows."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    changes = {"method.gates": {**OPEN, "identical": True}, "method.gamma": 2.0}
    comparison = Comparison(
        base={**base(model_folder), "sft": None},
        seeds=(0,),
        # A draft that is copied is identical: the gate rejects it, in pairing only.
        variants={
            "gated": {**changes, "method.copy_draft": True},
            "open": {"method.copy_draft": True},
        },
    )
    found, _ = cells(comparison, tmp_path)
    failed = play(found, jobs=1, say=lambda line: None, start=Ended)
    assert list(failed) == ["gated seed 0"]
    assert "made 0 pairs of 4 prompts (4 identical)" in failed["gated seed 0"]
    assert (found[0].folder / "rounds/0000/rejects.jsonl").read_text().count("\n") == 4
    assert (found[1].folder / "rounds/0000/rejects.jsonl").read_text() == ""
    assert ("0000", "ranked", "gated") in shared(found[1].folder)
    assert (found[1].folder / "policy").is_dir()
