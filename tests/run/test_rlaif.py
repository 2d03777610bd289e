"""RLAIF: a run that makes its reward model first, from pairs of its own drafts."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from prefloop.errors import RecipeError
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_recipe
from prefloop.run.loop import run
from prefloop.run_folder import read_metrics, read_run
from tests.run.test_reward_training import encoder_folder  # noqa: F401 (a fixture)

OPEN = {"cut_off": False, "identical": True, "meta_talk": False}


def write(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def recipe(model: Path, encoder: str, home: Path) -> Recipe:
    """Drafts ordered by chrF, a head over a tiny encoder, and a round of PPO, with the engine that babbles."""
    base = {"source": str(model), "device": "cpu", "dtype": "float32"}
    shared = {"model": base, "engine": {"name": "fake"}, "generate": {"chunk_size": 8}}
    drafts = {
        **shared,
        "method": {"name": "dpo", "pairs": "drafts", "gates": OPEN},
        "judge": {"name": "similarity"},
        "loop": {"rounds": 1, "prompts_per_round": 16},
    }
    reward = {
        "model": {"source": encoder, "tuning": "head", "device": "cpu"},
        "data": {"train": ["nothing.jsonl"], "holdout": 0.4},
        "train": {"max_length": 32},
    }
    return Recipe.model_validate(
        {
            **shared,
            "name": "rlaif",
            "reward": {
                "drafts": write(home / "drafts.yaml", drafts),
                "train": write(home / "reward.yaml", reward),
            },
            "method": {"name": "ppo", "sampling": {"max_new_tokens": 8}},
            "judge": {"name": "reward_model", "model": str(home / "made")},
            "engine": {"name": "hf"},
            "loop": {"rounds": 1, "prompts_per_round": 4},
            "train": {"epochs": 1, "batch_size": 2, "micro_batch_size": 2},
            "evaluate": {"prompts": 1, "every_round": False, "introspection": False},
        }
    )


def test_drafts_become_pairs_a_reward_model_and_a_policy(
    model_folder: Path,
    encoder_folder: str,  # noqa: F811
    tmp_path: Path,
    without_waiting_for_the_disk: None,
) -> None:
    chain = recipe(model_folder, encoder_folder, tmp_path)
    said = StringIO()
    outcome = run(chain, tmp_path / "runs" / "rlaif", Console(file=said, width=200))
    drafts = tmp_path / "runs" / "drafts"
    rows = [json.loads(line) for line in (drafts / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == read_run(drafts).round(0).count("pairs") > 10
    # The drafts' own recipe is not trained: its pairs are all that is wanted.
    assert not read_run(drafts).round(0).train.exists()
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["training"]["pairs"] < len(rows)
    steps = read_metrics(read_run(outcome.folder).round(0).train / "metrics.jsonl")
    assert "reward" in steps[0]
    assert "labelled pairs in" in said.getvalue()

    # The same command again makes nothing anew.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").glob("[a-z]*.*")}
    said = StringIO()
    run(chain, tmp_path / "runs" / "rlaif", Console(file=said, width=200))
    assert "is trained and measured already" in said.getvalue()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_check_reads_both_recipes_and_says_what_is_made_first(
    model_folder: Path,
    encoder_folder: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = recipe(model_folder, encoder_folder, tmp_path)
    shipped = chain.model_copy(
        update={"judge": chain.judge.model_copy(update={"model": "rewards/made"})}
    )
    monkeypatch.chdir(tmp_path)
    assert any("the run makes it first" in note for note in check_recipe(shipped))
    (tmp_path / "reward.yaml").write_text("data: {trian: [x]}\n")
    with pytest.raises(RecipeError, match="trian"):
        check_recipe(shipped)


def test_a_reward_model_that_no_judge_loads_is_refused(model_folder: Path, tmp_path: Path) -> None:
    values = recipe(model_folder, "x", tmp_path).model_dump(mode="json")
    values["judge"] = {"name": "rules", "max_words": 20}
    with pytest.raises(ValueError, match="name: reward_model"):
        Recipe.model_validate(values)


def test_drafts_that_need_a_reward_model_themselves_are_refused(
    model_folder: Path, tmp_path: Path
) -> None:
    chain = recipe(model_folder, "x", tmp_path)
    assert chain.reward is not None
    own = write(tmp_path / "own.yaml", chain.model_dump(mode="json"))
    again = chain.model_copy(update={"reward": chain.reward.model_copy(update={"drafts": own})})
    with pytest.raises(RecipeError, match="a reward model of its own"):
        check_recipe(again)


@pytest.mark.parametrize(
    ("drafts", "says"),
    [
        ({"name": "rlaif"}, "is called rlaif as the run itself is"),
        ({"method": {"name": "sft"}}, "method 'sft' of .* makes single answers"),
    ],
)
def test_drafts_that_make_no_pairs_or_share_the_runs_folder_are_refused(
    model_folder: Path, tmp_path: Path, drafts: dict[str, Any], says: str
) -> None:
    chain = recipe(model_folder, "x", tmp_path)
    assert chain.reward is not None
    path = Path(chain.reward.drafts)
    write(path, yaml.safe_load(path.read_text(encoding="utf-8")) | drafts)
    with pytest.raises(RecipeError, match=says):
        check_recipe(chain)
