"""The end of a run: the policy that it recommends, with a card made from the run."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefloop.models.sources import EMBEDDED
from prefloop.recipe import Recipe
from prefloop.records import RoundResult, read_json
from prefloop.report.model_card import CardFacts, write_model_card
from prefloop.run_folder import RoundDir, RunDir, replace_folder


def publish(recipe: Recipe, rundir: RunDir, here: RoundDir, results: Sequence[RoundResult]) -> Path:
    """Copy a round's policy, with a card made from the run, to RUN/policy."""
    final = rundir.path / "policy"
    temporary = rundir.path / ".policy"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(here.policy, temporary)
    embedded = EMBEDDED.get(recipe.model.source.removeprefix("embedded:"))
    base = embedded.hub_id if embedded else None
    if recipe.sft is not None and recipe.model.tuning == "lora":
        # The adapter fits the fine-tuned model of round 0, not the one it came from.
        base = "rounds/start/policy"
    rounds = rundir.rounds()
    rejects = sum((folder.reasons() for folder in rounds), Counter[str]())
    write_model_card(
        temporary,
        CardFacts(
            recipe=recipe.model_dump(mode="json"),
            results=results,
            environment=read_json(rundir.path / "environment.json"),
            pairs=sum(folder.count("pairs") for folder in rounds),
            rejects=rejects,
            base_model=base,
            license=embedded.license if embedded else None,
        ),
    )
    replace_folder(temporary, final)
    return final
