"""Reuse of stages that cells of a comparison have in common: their keys, and how their files are copied.

A stage's key covers every option that can influence its records, and more: an option is left out only where
it is known to be read later. Equal keys mean equal records, byte for byte, since a stage's random seed depends
on round and chunk only; tests/compare/test_compare_reuse.py compares the bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import prefloop.methods
from prefloop.config import plugin_name
from prefloop.recipe import Recipe
from prefloop.run_folder import REJECTS, RunDir

START_STAGES = ("sft", "answers", "introspection")
"""Stages of `rounds/start` that can be reused; its measures are computed in each cell."""
FIRST_ROUND_STAGES = ("candidates", "ranked")
_LATER_STAGES = ("rank", "pair", "loss")


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """A digest for each stage that can be reused; equal digests mean equal records."""
    method = recipe.method
    options: dict[str, Any] = recipe.model_dump(mode="json")
    name = plugin_name(prefloop.methods, method)
    initial_policy = {
        **{key: options[key] for key in ("seed", "model", "data", "engine", "generate", "launch")},
        # These decide which rows of the data are read, and how.
        "needs": [recipe.needs_target, method.needs_pairs],
        "sft": recipe.sft_train.model_dump(mode="json") if recipe.sft_train else None,
    }
    sampling = recipe.evaluate.sampling or method.sampling
    generation = {
        **initial_policy,
        "name": name,
        "judge": options["judge"],
        "method": _options(recipe, "generate"),
    }
    ranked = {**generation, "method": _options(recipe, "rank")}
    held_out = {"prompts": recipe.evaluate.prompts}
    answers = {"sampling": sampling.model_dump(mode="json"), "prompt_set": method.prompt_set}
    size = {"prompts_per_round": recipe.loop.prompts_per_round}
    values_by_stage = {
        "sft": initial_policy,
        "answers": {**initial_policy, **held_out, **answers, "judge": options["judge"]},
        "introspection": {**ranked, **held_out},
        "candidates": {**generation, **size},
        "ranked": {**ranked, **size},
    }
    if recipe.sft is None:
        del values_by_stage["sft"]
    if not recipe.evaluate.introspection:
        del values_by_stage["introspection"]
    return {
        stage: sha256(json.dumps([stage, values], sort_keys=True).encode()).hexdigest()[:16]
        for stage, values in values_by_stage.items()
    }


def _options(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The method's options that this stage, or one before it, may read."""
    method = recipe.method
    later_stages = (
        _LATER_STAGES[_LATER_STAGES.index(stage) + 1 :] if stage in _LATER_STAGES else _LATER_STAGES
    )
    unread = {
        "reference",
        *(key for key, first in method.first_read.items() if first in later_stages),
    }
    return {k: v for k, v in method.model_dump(mode="json").items() if k not in unread}


def copy_stages(run: RunDir, donors: Mapping[str, Path]) -> list[str]:
    """Copy stages from other cells' folders (stage -> folder) into the run; returns the stages copied.

    Only into rounds that the run has not begun; each round appears complete, by a rename. The run's events
    record the origin.
    """
    copied = []
    for folder, stages in (("start", START_STAGES), ("0000", FIRST_ROUND_STAGES)):
        # A stage needs the ones before it, so none is copied without them.
        stages_here = [stage for stage in stages if stage in donors]
        if folder == "0000" and stages_here and stages_here[0] != "candidates":
            continue
        final = run.path / "rounds" / folder
        if not stages_here or final.exists():
            continue
        temporary = run.path / f".shared-{folder}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for stage in stages_here:
            _copy(donors[stage] / "rounds" / folder, temporary, stage)
        if stages_here[-1] != "sft":
            _copy_rejects(donors[stages_here[-1]] / "rounds" / folder, temporary, stages_here[-1])
        final.parent.mkdir(exist_ok=True)
        temporary.rename(final)
        for stage in stages_here:
            run.event("shared", round=folder, stage=stage, origin=str(donors[stage]))
        copied += stages_here
    return copied


def _copy(origin: Path, target: Path, stage: str) -> None:
    names = ["policy", "train"] if stage == "sft" else [f"{stage}.jsonl"]
    for name in [*names, f"{stage}.done.json"]:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, target / name, copy_function=_link)
        else:
            shutil.copy2(origin / name, target / name)


def _link(origin: str, target: str) -> None:
    """Copy a file, weights as hard links: they are large and never changed in place."""
    if origin.endswith(".safetensors"):
        try:
            os.link(origin, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copy2(origin, target)


def _copy_rejects(origin: Path, target: Path, stage: str) -> None:
    """Copy the rejects up to the end of `stage`; the origin may already hold those of later stages."""
    manifest = json.loads((origin / f"{stage}.done.json").read_text(encoding="utf-8"))
    count = sum(manifest.get("rejects", {}).values())
    with (origin / REJECTS).open(encoding="utf-8") as file:
        (target / REJECTS).write_text("".join(islice(file, count)), encoding="utf-8")
