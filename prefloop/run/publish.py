"""A run's end: its policy as an adapter with a card, or as one whole model."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefloop.errors import RunFolderError
from prefloop.models.policy import Policy
from prefloop.models.sources import EMBEDDED, quiet, without_code
from prefloop.recipe import Recipe, initial_source, load_recipe
from prefloop.records import RoundResult, read_json
from prefloop.report.model_card import CardFacts, write_model_card
from prefloop.run_folder import (
    PUBLISHED,
    RoundDir,
    RunDir,
    disk_in_words,
    read_run,
    replace_folder,
)


def publish(
    recipe: Recipe, rundir: RunDir, round_dir: RoundDir, results: Sequence[RoundResult]
) -> Path:
    """Copy a round's policy, with a card made from the run, to RUN/policy."""
    final = rundir.path / PUBLISHED
    temporary = rundir.path / ".policy"
    shutil.rmtree(temporary, ignore_errors=True)
    round_dir.verify_policy()
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
    rundir.published.path.unlink(missing_ok=True)
    replace_folder(temporary, final)
    # A card is the user's to write on.
    files = [path for path in final.rglob("*") if path.is_file() and path.name != "README.md"]
    rundir.published.write({"round": round_dir.number}, sorted(files))
    return final


def merge_policy(run_folder: Path, out: Path, *, trust_remote_code: bool = False) -> Path:
    """Write the run's published policy, adapter merged in, to `out`, in the dtype it was trained in.

    Code that comes with the model is run only where the caller says so, whatever the run's recipe says.
    Raises RunFolderError if the run has published none, it has changed, or `out` holds something or cannot be
    written; ModelError if the model cannot be loaded.
    """
    run = read_run(run_folder)
    adapter = run.verify_published()
    if adapter is None:
        raise RunFolderError(f"{run.path} has no policy yet; finish it with prefloop run")
    if out.exists():
        raise RunFolderError(f"{out} exists; name a folder that does not")
    recipe = load_recipe(str(run.path / "recipe.yaml"))
    source = without_code(initial_source(recipe, run), trust_remote_code)
    policy = Policy.load(source, adapter, trainable=False)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with quiet(), disk_in_words(out.parent):
            policy.merge().save_pretrained(part)
            policy.tokenizer.save_pretrained(part)
            shutil.copy(adapter / "README.md", part / "README.md")
            replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out
