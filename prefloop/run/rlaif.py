"""Before a run's first round: drafts, pairs that a judge labels, and the reward model that the run's judge loads.

RUNS/DRAFTS/          round 0 of the drafts' recipe, as far as its pairs, and pairs.jsonl
JUDGE.MODEL/          the reward model, as `prefloop reward train` leaves it

Each step goes on where it was stopped, and is not done again once it is finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from prefloop.data.export import export_pairs
from prefloop.recipe import Recipe, load_recipe
from prefloop.recipe.reward import load_reward_recipe
from prefloop.records import Pair
from prefloop.run.reward import train_reward

MakePairs = Callable[[Recipe, Path, Console], list[Pair]]


def make_reward_model(
    recipe: Recipe, folder: Path, console: Console, make_pairs: MakePairs
) -> None:
    """Make the reward model of a recipe with a section `reward`; the drafts lie beside the run's `folder`.

    `make_pairs` plays the drafts' recipe into a folder as far as its first round's pairs.
    Raises what playing the drafts' recipe and training the reward model raise.
    """
    assert recipe.reward is not None
    assert recipe.judge is not None
    drafts = load_recipe(recipe.reward.drafts)
    drafts_folder = folder.parent / drafts.name
    pairs = make_pairs(drafts, drafts_folder, console)
    # A cut-off answer would be read as one that ends there.
    finished = [pair for pair in pairs if not pair.unfinished]
    exported = export_pairs(finished, drafts_folder / "pairs.jsonl")
    console.print(f"drafts   {exported.pairs} labelled pairs in {exported.path}", highlight=False)
    train = load_reward_recipe(
        recipe.reward.train, [f"data.train={json.dumps([str(exported.path)])}"]
    )

    def say(line: str) -> None:
        console.print(f"reward   {line}", highlight=False, soft_wrap=True)

    train_reward(train, Path(recipe.judge.sources["model"]), say)
