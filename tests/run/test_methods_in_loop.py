"""Every method goes around a small loop on a tiny model; what the methods ask of the loop is kept."""

import json
from collections.abc import Callable, Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import prefloop.methods
import prefloop.train.trainer
from prefloop.config import find_plugin, plugin_names
from prefloop.data.export import export_pairs
from prefloop.errors import DataError
from prefloop.generate.hf_engine import HFEngine
from prefloop.models.policy import Policy
from prefloop.models.sources import ModelOptions
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_recipe
from prefloop.records import Pair, Request, Sampling
from prefloop.run.loop import run
from prefloop.run_folder import Outcome, read_metrics, read_run

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")

METHODS = [name for name in plugin_names(prefloop.methods) if name not in ("ial", "arop", "ppo")]
"""Without those whose loops have a test file of their own."""
OPEN = {"cut_off": False, "identical": False, "meta_talk": False}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of labelled pairs."""
    path = tmp_path_factory.mktemp("data") / "labelled.jsonl"
    write(path, map(row, range(12)))
    return path


def row(number: int) -> dict[str, Any]:
    return {
        "id": number,
        "prompt": f"Count to {number}.",
        "chosen": f"1 to {number}.",
        "rejected": f"No {number}.",
    }


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(model_folder: Path, labelled: Path) -> Make:
    def made(
        name: str, rounds: int = 2, sections: dict[str, Any] | None = None, **options: Any
    ) -> Recipe:
        kind = find_plugin(prefloop.methods, name, prefloop.methods.Method, "method")
        method = {"name": name, **options}
        for field, info in kind.model_fields.items():
            if isinstance(info.get_default(call_default_factory=True), Sampling):
                method[field] = {"max_new_tokens": 6, **options.get(field, {})}
        if "gates" in kind.model_fields:
            method.setdefault("gates", OPEN)
        values: dict[str, Any] = {
            "name": "run",
            "model": {"source": str(model_folder), "device": "cpu", "dtype": "float32"},
            "data": {"train": str(labelled), "holdout": 2, "response_field": "chosen"},
            # The policy itself for self-rewarding: words by chance all share nothing with a target.
            "judge": {"name": "self_judge" if name == "self_rewarding" else "similarity"},
            "method": method,
            "generate": {"chunk_size": 3},
            "loop": {"rounds": rounds, "prompts_per_round": 6},
            "train": {"epochs": 1, "lr": 1e-3, "batch_size": 4, "micro_batch_size": 2},
            "evaluate": {"prompts": 2},
            "guard": {"min_stop_rate": 0.0},
        }
        for section, changes in (sections or {}).items():
            values[section] = {**values[section], **changes} if changes is not None else None
        return Recipe.model_validate(values)

    return made


def play(recipe: Recipe, folder: Path) -> Outcome:
    return run(recipe, folder, Console(file=StringIO()))


def pairs_of(folder: Path, number: int) -> list[Pair]:
    return read_run(folder).round(number).records("pairs", Pair)


def kept(folder: Path) -> dict[str, bytes]:
    """Records, measures, training metrics and weights."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".jsonl", ".safetensors") and path.name != "events.jsonl"
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_method_plays_two_rounds_and_a_killed_one_ends_in_the_same_bytes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = make(name, sections={"train": {"save_every": 1}})
    check_recipe(recipe)
    whole = play(recipe, tmp_path / "whole")
    assert [result.round for result in whole.results] == [-1, 0, 1]
    for number in range(2):
        round_dir = read_run(whole.folder).round(number)
        assert round_dir.count("pairs") + round_dir.reasons().total() == 6
        assert round_dir.count("pairs") >= 5
    assert whole.results[-1].measures["train_loss"] is not None

    with monkeypatch.context() as patch:
        step, calls = prefloop.train.trainer.Trainer._step, []

        def dies(self: Any, *rest: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step(self, *rest)

        patch.setattr(prefloop.train.trainer.Trainer, "_step", dies)
        with pytest.raises(KeyboardInterrupt):
            play(recipe, tmp_path / "killed")
    assert kept(play(recipe, tmp_path / "killed").folder) == kept(whole.folder)


def test_labelled_pairs_are_trained_on_as_they_stand_and_useless_rows_are_counted(
    make: Make, tmp_path: Path
) -> None:
    """The chosen answer is the target where the data have no answer of their own."""
    rows = [*map(row, range(8)), {**row(8), "rejected": "1 to 8."}, {**row(9), "chosen": " "}]
    write(tmp_path / "data.jsonl", rows)
    data = {"train": str(tmp_path / "data.jsonl"), "response_field": "response"}
    outcome = play(make("dpo", rounds=1, sections={"data": data}), tmp_path / "run")
    pairs = pairs_of(outcome.folder, 0)
    assert len(pairs) == 6
    for pair in pairs:
        assert (pair.chosen, pair.rejected) == (f"1 to {pair.prompt_id}.", f"No {pair.prompt_id}.")
        assert pair.target == pair.chosen
    lines = (outcome.folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    [read] = [event for event in events if event["event"] == "data"]
    assert read["dropped"] == {"identical answers": 1, "empty answer": 1}


def test_drafts_are_ordered_by_the_judge_and_written_by_the_generator_that_was_named(
    make: Make, tmp_path: Path
) -> None:
    """Frozen by default: a static set. In round 0 the current policy is the initial one."""
    # Long enough to share a character or two with the target by chance.
    drafts = {"pairs": "drafts", "sampling": {"max_new_tokens": 24}}
    outcome = play(make("dpo", **drafts), tmp_path / "static")
    moving = play(make("dpo", **drafts, generator="current"), tmp_path / "moving")
    for number in range(2):
        for pair in pairs_of(outcome.folder, number):
            assert pair.scores["chosen"] > pair.scores["rejected"]
    texts = [
        [(p.chosen, p.rejected) for p in pairs_of(found.folder, 0)] for found in (outcome, moving)
    ]
    assert texts[0] == texts[1]
    assert pairs_of(outcome.folder, 1) != pairs_of(moving.folder, 1)


def test_without_labelled_pairs_in_the_data_a_run_says_so(make: Make, tmp_path: Path) -> None:
    recipe = make("dpo", sections={"data": {"train": "embedded:instructions", "holdout": 0}})
    with pytest.raises(DataError, match="has no labelled pairs"):
        check_recipe(recipe)
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "Hi", "response": "Ho"}\n' * 3)
    recipe = make("dpo", sections={"data": {"train": str(plain), "holdout": 0, "eval": str(plain)}})
    with pytest.raises(DataError, match=r"plain.jsonl:1 has neither 'chosen' and 'rejected'"):
        check_recipe(recipe)


def test_evaluation_prompts_of_a_method_of_labelled_pairs_need_none(
    make: Make, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "Hi", "response": "Ho", "id": 1}\n')
    data = {"holdout": 0, "eval": str(plain), "response_field": "response"}
    recipe = make("dpo", rounds=1, sections={"data": data})
    check_recipe(recipe)
    assert [result.round for result in play(recipe, tmp_path / "run").results] == [-1, 0]


def test_sft_computes_no_reference_and_leaves_nothing_to_export(make: Make, tmp_path: Path) -> None:
    outcome = play(make("sft", rounds=1), tmp_path / "run")
    assert not (outcome.folder / "rounds/0000/train/reference.safetensors").exists()
    with pytest.raises(DataError, match="single answers"):
        export_pairs(pairs_of(outcome.folder, 0), tmp_path / "pairs.jsonl")


def test_the_learning_rate_of_a_round_is_multiplied_by_its_factor(
    make: Make, tmp_path: Path
) -> None:
    """The last factor holds for the rounds that follow."""
    sections = {
        "loop": {"lr_factors": [1.0, 0.2]},
        "train": {"schedule": "constant", "warmup": 0.0, "lr": 1e-3},
    }
    outcome = play(make("spin", rounds=3, sections=sections), tmp_path / "run")
    for number, expected in enumerate((1e-3, 2e-4, 2e-4)):
        rows = read_metrics(outcome.folder / f"rounds/{number:04d}/train/metrics.jsonl")
        assert [row["lr"] for row in rows] == pytest.approx([expected] * len(rows))


def test_spa_labels_by_the_policys_way_from_the_initial_one_and_smooths_half_of_a_round(
    make: Make, model_folder: Path, tmp_path: Path
) -> None:
    """Scores of round 1 are beta times log pi_1 - log pi_0 of its drafts, asked of each model by itself."""
    recipe = make("spa", least_confident=50, beta=0.5)
    folder = play(recipe, tmp_path / "run").folder
    seed, later = pairs_of(folder, 0), pairs_of(folder, 1)
    assert {pair.smoothing for pair in seed} == {0.0}
    assert [pair.smoothing for pair in later].count(0.1) == 3, "of six in two chunks"
    assert all(pair.token_ids.keys() == {"chosen", "rejected"} for pair in later)
    assert not any(pair.token_ids for pair in seed), "labelled pairs were sampled by nobody"
    options = ModelOptions(source=str(model_folder), device="cpu", dtype="float32")
    trained = Policy.load(options, folder / "rounds/0000/policy")
    initial = Policy.load(options)
    for pair in later:
        asks = [Request(messages=pair.prompt)] * 2
        said = [pair.answer("chosen"), pair.answer("rejected")]
        now, before = (
            [sum(s.logprobs) for s in HFEngine(p.model, p.tokenizer).score(asks, said)]
            for p in (trained, initial)
        )
        rewards = [0.5 * (a - b) for a, b in zip(now, before, strict=True)]
        assert [pair.scores["chosen"], pair.scores["rejected"]] == pytest.approx(rewards, abs=1e-3)
        assert rewards[0] > rewards[1]
    smoothed = read_metrics(folder / "rounds/0001/train/metrics.jsonl")
    assert sum(row["smoothed"] for row in smoothed) > 0


def test_sft_and_dpo_are_two_stages_of_one_recipe(make: Make, tmp_path: Path) -> None:
    """Round 0 learns the chosen answers; DPO's reference is the model that comes out."""
    recipe = make("dpo", rounds=1)
    values = {**json.loads(recipe.model_dump_json()), "sft": {"epochs": 2, "batch_size": 4}}
    values["data"]["response_field"] = "response"
    outcome = play(Recipe.model_validate(values), tmp_path / "run")
    manifest = read_run(outcome.folder).round(-1).manifest("sft")
    assert manifest is not None
    assert manifest["last_loss"] < manifest["first_loss"]
    rows = read_metrics(outcome.folder / "rounds/0000/train/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
