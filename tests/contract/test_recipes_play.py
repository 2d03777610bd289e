"""Every shipped recipe is played up to its first training step: a tiny model, and rows with its data set's columns.

The rows are invented; columns, splits and the nesting of turns are those of the published sets. Rows reach the
recipe under its own `split` and field options, so a wrong one fails here and not on a user's eight cards.
"""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars
from rich.console import Console

from prefloop.config import SHIPPED
from prefloop.recipe import Recipe, load_recipe
from prefloop.recipe.check import check_recipe
from prefloop.recipe.reward import RewardRecipe, load_reward_recipe
from prefloop.records import Request
from prefloop.run.loop import run
from prefloop.run.reward import train_reward
from prefloop.run_folder import read_metrics, read_run
from tests.run.test_reward_training import encoder_folder  # noqa: F401 (a fixture)

Rows = list[dict[str, Any]]
RECIPES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
REWARD_RECIPES = sorted(path.stem for path in (SHIPPED / "reward").glob("*.yaml"))


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def ultrachat(count: int) -> Rows:
    """HuggingFaceH4/ultrachat_200k: the whole conversation in `messages`, its first turn again in `prompt`."""
    return [
        {
            "prompt": f"Which way to w{n}?",
            "prompt_id": f"{n:064x}",
            "messages": [*turns(f"Which way to w{n}?", f"By w{n}."), *turns("Sure?", "Quite so.")],
        }
        for n in range(count)
    ]


def trl_ultrafeedback(count: int) -> Rows:
    """trl-lib/ultrafeedback_binarized: two conversations with a common prompt, and their scores."""
    return [
        {
            "chosen": turns(f"Which way to w{n}?", f"By w{n} and on."),
            "rejected": turns(f"Which way to w{n}?", "No idea at all."),
            "score_chosen": 8.0,
            "score_rejected": 4.5,
        }
        for n in range(count)
    ]


def h4_ultrafeedback(count: int) -> Rows:
    """HuggingFaceH4/ultrafeedback_binarized: also the prompt as a text, and `messages` equal to `chosen`."""
    return [
        {
            "prompt": row["chosen"][0]["content"],
            "prompt_id": f"{n:064x}",
            **row,
            "messages": row["chosen"],
        }
        for n, row in enumerate(trl_ultrafeedback(count))
    ]


SETS = {
    "HuggingFaceH4/ultrachat_200k": (ultrachat, ("train_sft", "test_sft", "train_gen", "test_gen")),
    "trl-lib/ultrafeedback_binarized": (trl_ultrafeedback, ("train", "test")),
    "HuggingFaceH4/ultrafeedback_binarized": (
        h4_ultrafeedback,
        ("train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"),
    ),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders that stand for the sets of the hub, by name."""
    home = tmp_path_factory.mktemp("sets")
    disable_progress_bars()
    for name, (rows, splits) in SETS.items():
        data = DatasetDict({split: Dataset.from_list(rows(24)) for split in splits})
        data.save_to_disk(home / name)
    return {name: str(home / name) for name in SETS}


def small(values: Any) -> Any:
    """The same options with short answers: every `max_new_tokens` is 6."""
    if isinstance(values, dict):
        return {k: 6 if k == "max_new_tokens" else small(v) for k, v in values.items()}
    return values


def final_answer(request: Request, seed: int, limit: int) -> str:
    """What AROP's full prompts ask for: the answer stands behind these words, and a flaw changes little of it."""
    return f"Final answer: The way leads north by the quiet river, over stone {seed % 10_000}."


def tiny(recipe: Recipe, model: Path, sets: dict[str, str]) -> Recipe:
    """The recipe with what one machine has: another model, other sizes, no launcher, a judge without weights."""
    values = recipe.model_dump(mode="json")
    values["model"] |= {"source": str(model), "device": "cpu"}
    values["method"] = small(values["method"])
    for key in ("train", "eval"):
        values["data"][key] = sets.get(values["data"][key], values["data"][key])
    if recipe.judge is not None and recipe.judge.sources:
        values["judge"] = {"name": "similarity" if recipe.judge.needs_target else "self_judge"}
    values["engine"] = {"name": "fake"}
    values["launch"] = None
    values["reward"] = None
    values["loop"] |= {"rounds": 1, "prompts_per_round": 4, "lr_factors": [1.0]}
    values["train"] |= {"batch_size": 4, "micro_batch_size": 2, "epochs": 1}
    if recipe.sft is not None:
        values["sft"] |= {"batch_size": 4, "epochs": 1}
    values["evaluate"] |= {"prompts": 2}
    return Recipe.model_validate(values)


@pytest.mark.parametrize(
    "name",
    [
        # Those with embedded data differ in little; the quick tier takes all with sets of the hub.
        pytest.param(name, marks=pytest.mark.slow) if "smollm2" in name else name
        for name in RECIPES
    ],
)
def test_a_recipe_gets_to_its_first_training_step(
    name: str,
    sets: dict[str, str],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_waiting_for_the_disk: None,
) -> None:
    shipped = load_recipe(name)
    assert shipped.data.train in (*SETS, "embedded:instructions"), "a set without rows here"
    if name == "arop-llama3-8b":
        monkeypatch.setattr("prefloop.generate.engines.fake._babble", final_answer)
    recipe = tiny(shipped, model_folder, sets)
    check_recipe(recipe)
    outcome = run(recipe, tmp_path / "run", Console(file=StringIO()))
    round_dir = read_run(outcome.folder).round(0)
    assert round_dir.reasons() == {}
    assert read_metrics(round_dir.train / "metrics.jsonl")


PAIRS: dict[str, Rows] = {
    "hh_harmless": [
        {
            "id": f"h{n}",
            "messages": turns(f"which way w{n}", "very good")[:1],
            "chosen": f"good w{n}",
            "rejected": f"bad w{n}",
        }
        for n in range(16)
    ],
    "pandalm": [
        {
            "id": f"p{n}",
            "prompt": f"which way w{n}",
            "response_1": f"good w{n}",
            "response_2": f"bad w{n}",
            "annotators": [1, 1, 2],
        }
        for n in range(16)
    ],
    "rlaif-drafts": [
        {
            "prompt": turns(f"which way w{n}", "")[:1],
            "chosen": f"good w{n}",
            "rejected": f"bad w{n}",
        }
        for n in range(16)
    ],
    "short_tasks_polite": [
        {"prompt": f"which way w{n}", "chosen": f"good w{n}", "rejected": f"bad w{n}"}
        for n in range(16)
    ],
}
"""The files that docs/reward-models.md names, in the shapes that it shows."""


@pytest.mark.parametrize("name", REWARD_RECIPES)
def test_a_reward_recipe_trains(
    name: str,
    sets: dict[str, str],
    model_folder: Path,
    encoder_folder: str,  # noqa: F811
    tmp_path: Path,
    without_waiting_for_the_disk: None,
) -> None:
    shipped = load_reward_recipe(name)
    values = shipped.model_dump(mode="json")
    embedded = shipped.model.source.startswith("embedded:")
    values["model"] |= {"source": encoder_folder if embedded else str(model_folder)}
    values["model"] |= {"device": "cpu"}
    values["train"] |= {"max_length": 64, "batch_size": 4, "micro_batch_size": 2, "epochs": 1}
    values["data"] |= {"train": [], "holdout": 0.4}
    for source in shipped.data.train:
        path = tmp_path / Path(source).name
        if source not in sets:
            path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[path.stem]))
        values["data"]["train"].append(sets.get(source, str(path)))
    report = train_reward(RewardRecipe.model_validate(values), tmp_path / "reward")
    assert report["dropped"] == {}
    assert report["training"]["pairs"] >= 4
