"""What `model.dtype: auto` becomes in a run: chosen when it begins, noted in its folder, kept wherever it goes on."""

from __future__ import annotations

import logging
from typing import Any

import torch

from prefloop.models.adapter import part_apart
from prefloop.models.dtype import Choice, choose_dtype, device_type
from prefloop.models.policy import auto_dtype
from prefloop.models.sources import local_folder, resolve_source
from prefloop.recipe import DTYPE, Recipe, against_bfloat16, dtype_of_run
from prefloop.run_folder import RunDir

log = logging.getLogger(__name__)


def settle_dtype(recipe: Recipe, rundir: RunDir) -> Choice | None:
    """Note the dtype of a run that begins, and return the choice; None where the run has one, or the recipe names one.

    A run that would begin in another one here is told so, and goes on in its own. Raises ModelError.
    """
    if recipe.model.dtype != "auto":
        return None
    settled = dtype_of_run(recipe, rundir)
    folder = local_folder(resolve_source(recipe.model.source), recipe.model)
    device = torch.device(device_type(recipe.model.device))
    choice = auto_dtype(recipe.model, device, folder, against_bfloat16(recipe))
    rundir.same_inputs({DTYPE: settled or choice.dtype})
    if settled is None:
        rundir.event("dtype", dtype=choice.dtype, why=choice.why)
        return choice
    if settled != choice.dtype:
        log.warning("the run goes on in %s, as it began; %s", settled, choice.in_words())
    return None


def dtype_of(model: Any, recipe: Recipe, device: str) -> str:
    """What a run of the recipe on a device ("cpu", "cuda") would choose for this model, which may be without weights."""
    choice = choose_dtype(recipe.model, device, against_bfloat16(recipe))
    is_open = recipe.model.dtype == "auto" and device == "cpu" and choice.dtype == "bfloat16"
    return "float32" if is_open and part_apart(model, recipe.model.lora) else choice.dtype
