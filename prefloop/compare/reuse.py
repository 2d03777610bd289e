"""Work that cells of a comparison have in common, done once: which stages, by what key, and how it is copied.

A stage's key holds every option that can enter its records, and more: an option is left out only where
it is known to come later. Equal keys mean equal records, byte for byte, for a stage draws its random
numbers from its place alone; tests/compare/test_compare_reuse.py compares the bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import prefloop.methods
from prefloop.config import plugin_name
from prefloop.recipe import Recipe
from prefloop.run_folder import REJECTS, RoundDir, RunDir

START = ("sft", "answers", "introspection")
"""What is shared of `rounds/start`; its measures are worked out in each cell."""
FIRST_ROUND = ("candidates", "ranked")
_LATER = ("rank", "pair", "loss")


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """A digest for each stage that can be shared; equal digests, equal work."""
    method = recipe.method
    told: dict[str, Any] = recipe.model_dump(mode="json")
    name = plugin_name(prefloop.methods, method)
    policy = {
        **{key: told[key] for key in ("seed", "model", "data", "engine", "generate", "launch")},
        # They decide which rows of the data are read, and how.
        "needs": [recipe.needs_target, method.needs_pairs],
        "sft": recipe.sft_train.model_dump(mode="json") if recipe.sft_train else None,
    }
    sampling = recipe.evaluate.sampling or method.sampling
    text = {**policy, "name": name, "judge": told["judge"], "method": _options(recipe, "generate")}
    ranked = {**text, "method": _options(recipe, "rank")}
    held_out = {"prompts": recipe.evaluate.prompts}
    answers = {"sampling": sampling.model_dump(mode="json"), "prompt_set": method.prompt_set}
    size = {"prompts_per_round": recipe.loop.prompts_per_round}
    found = {
        "sft": policy,
        "answers": {**policy, **held_out, **answers, "judge": told["judge"]},
        "introspection": {**ranked, **held_out},
        "candidates": {**text, **size},
        "ranked": {**ranked, **size},
    }
    if recipe.sft is None:
        del found["sft"]
    if not recipe.evaluate.introspection:
        del found["introspection"]
    return {
        stage: sha256(json.dumps([stage, values], sort_keys=True).encode()).hexdigest()[:16]
        for stage, values in found.items()
    }


def _options(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The method's options that the stage, or one before it, may look at."""
    method = recipe.method
    late = _LATER[_LATER.index(stage) + 1 :] if stage in _LATER else _LATER
    later = {"reference", *(key for key, first in method.first_read.items() if first in late)}
    return {k: v for k, v in method.model_dump(mode="json").items() if k not in later}


def inherit(run: RunDir, donors: Mapping[str, Path]) -> list[str]:
    """Take over stages from other cells' folders, by stage, and note where from; returns those taken.

    Only into rounds that the run has not begun: each appears whole, by a rename.
    """
    taken = []
    for folder, stages in (("start", START), ("0000", FIRST_ROUND)):
        # None without the ones before it: a stage stands on those.
        wanted = [stage for stage in stages if stage in donors]
        if folder == "0000" and wanted and wanted[0] != "candidates":
            continue
        final = run.path / "rounds" / folder
        if not wanted or final.exists():
            continue
        part = run.path / f".shared-{folder}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for stage in wanted:
            _copy(donors[stage] / "rounds" / folder, part, stage)
        if wanted[-1] != "sft":
            _copy_rejects(donors[wanted[-1]] / "rounds" / folder, part, wanted[-1])
        final.parent.mkdir(exist_ok=True)
        part.rename(final)
        for stage in wanted:
            run.event("shared", round=folder, stage=stage, origin=str(donors[stage]))
        taken += wanted
    return taken


def _copy(origin: Path, target: Path, stage: str) -> None:
    RoundDir(origin, -1 if origin.name == "start" else int(origin.name)).verify(stage)
    names = ["policy", "train"] if stage == "sft" else [f"{stage}.jsonl"]
    for name in [*names, f"{stage}.done.json"]:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, target / name, copy_function=_link)
        else:
            shutil.copy2(origin / name, target / name)


def _link(origin: str, target: str) -> None:
    """Weights are large and never changed in place, so two runs may hold the same file."""
    if origin.endswith(".safetensors"):
        try:
            os.link(origin, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copy2(origin, target)


def _copy_rejects(origin: Path, target: Path, stage: str) -> None:
    """The rejects up to the end of a stage; the origin may have added those of later ones."""
    facts = RoundDir(origin, 0).manifest(stage) or {}
    # Of a stage that measures it is not said how many there were: there were none.
    size = facts.get("growing", {}).get(REJECTS, [0])[0]
    with (origin / REJECTS).open("rb") as file:
        (target / REJECTS).write_bytes(file.read(size))
