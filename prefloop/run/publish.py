"""A run's end: its policy as an adapter with a card, or as one whole model."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefloop.errors import RunFolderError
from prefloop.models.policy import Policy
from prefloop.models.sources import EMBEDDED, quiet
from prefloop.recipe import Recipe, initial_source, load_recipe
from prefloop.records import RoundResult, read_json
from prefloop.report.model_card import CardFacts, write_model_card
from prefloop.run_folder import RoundDir, RunDir, read_run, replace_folder


def publish(
    recipe: Recipe, rundir: RunDir, round_dir: RoundDir, results: Sequence[RoundResult]
) -> Path:
    """Copy a round's policy, with a card made from the run, to RUN/policy."""
    final = rundir.path / "policy"
    temporary = rundir.path / ".policy"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(round_dir.policy, temporary)
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


def merge_policy(run_folder: Path, out: Path) -> Path:
    """Write the run's published policy, adapter merged in, to `out`, in the dtype it was trained in.

    Raises RunFolderError if the run has published none or `out` holds something, ModelError if the
    model cannot be loaded.
    """
    run = read_run(run_folder)
    adapter = run.path / "policy"
    if not adapter.is_dir():
        raise RunFolderError(f"{run.path} has no policy yet; finish it with prefloop run")
    if out.exists():
        raise RunFolderError(f"{out} exists; name a folder that does not")
    recipe = load_recipe(str(run.path / "recipe.yaml"))
    policy = Policy.load(initial_source(recipe, run), adapter, trainable=False)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with quiet():
        policy.merge().save_pretrained(part)
        policy.tokenizer.save_pretrained(part)
    shutil.copy(adapter / "README.md", part / "README.md")
    replace_folder(part, out)
    return out
