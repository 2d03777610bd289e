"""A run's policy as one plain model folder, for engines that know no adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

from prefloop.errors import RunFolderError
from prefloop.models.policy import Policy
from prefloop.models.sources import quiet
from prefloop.recipe import load_recipe
from prefloop.run.outside import initial_source
from prefloop.run_folder import read_run, replace_folder


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
