"""Reuse of stages that cells of a comparison have in common: their keys, and how their files are copied.

A stage's key holds every option that can enter its records, and more: an option of a method is left out only
where nothing in the method's own code can read it before a later stage. Equal keys mean equal records, byte for byte, for a stage draws its random
numbers from its place alone; tests/compare/test_compare_reuse.py compares the bytes.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import textwrap
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any

import prefloop.methods
from prefloop.config import plugin_name
from prefloop.methods import Method
from prefloop.recipe import Recipe
from prefloop.run_folder import REJECTS, RoundDir, RunDir

START_STAGES = ("sft", "answers", "introspection")
"""Stages of `rounds/start` that can be reused; its measures are computed in each cell."""
FIRST_ROUND_STAGES = ("candidates", "ranked")
_ENTRANCES = {
    "generate": ("generate", "needs_target", "needs_pairs", "needs_judge"),
    "rank": ("generate", "needs_target", "needs_pairs", "needs_judge", "rank"),
}
"""What a run calls of a method up to the end of a stage."""


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
    answers_judge = options["eval_judge"] or options["judge"]
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
        "answers": {**initial_policy, **held_out, **answers, "judge": answers_judge},
        # The method is played with the answers that are known.
        "introspection": {**ranked, **held_out, **answers},
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
    """The method's options that the stage, or one before it, may look at."""
    read = options_read(type(recipe.method), stage)
    return {k: v for k, v in recipe.method.model_dump(mode="json").items() if k in read}


def options_read(kind: type[Method], stage: str) -> set[str]:
    """The options that a method may read up to the end of `stage`, "generate" or "rank".

    Found in its source: what the stage's functions say `self.name` of, and whatever they call on self. Where
    they pass self on as a whole, or call what is not written in a method's class, it is every option.
    `reference` is the trainer's; the other options of all methods are read by the run itself.
    """
    fields = kind.model_fields.keys()
    found = Method.model_fields.keys() - {"reference"}
    todo, done = list(_ENTRANCES[stage]), set()
    while todo:
        name = todo.pop()
        if name in fields:
            found.add(name)
        elif name not in done:
            done.add(name)
            called = _names_said_of_self(kind, name)
            if called is None:
                return set(fields)
            todo += called
    return found


def _names_said_of_self(kind: type[Method], name: str) -> set[str] | None:
    """Attributes of self that `name` mentions, in each class that defines it; None where that cannot be told."""
    owners = [owner for owner in kind.__mro__ if name in vars(owner)]
    if not owners or not all(issubclass(owner, Method) for owner in owners):
        return None
    mentioned: set[str] = set()
    for owner in owners:
        value = vars(owner)[name]
        function = value.fget if isinstance(value, property) else value
        if inspect.isfunction(function):
            said = _attributes_of_self(function)
            if said is None:
                return None
            mentioned |= said
        elif callable(value) or hasattr(value, "__get__"):
            return None
    return mentioned


def _attributes_of_self(function: FunctionType) -> set[str] | None:
    """Names that stand behind `self.` or `super().` in a function; None where self is used in another way."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return None
    [code] = tree.body
    if not isinstance(code, ast.FunctionDef) or code.args.args[0].arg != "self":
        return None
    selves = [n for n in ast.walk(code) if isinstance(n, ast.Name) and n.id in ("self", "super")]
    said = [
        node.attr
        for node in ast.walk(code)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    ]
    return set(said) if len(said) == len(selves) else None


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
    RoundDir(origin, -1 if origin.name == "start" else int(origin.name)).verify(stage)
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
    facts = RoundDir(origin, 0).manifest(stage) or {}
    # A stage that measures does not say how many there were: there were none.
    size = facts.get("growing", {}).get(REJECTS, [0])[0]
    with (origin / REJECTS).open("rb") as file:
        (target / REJECTS).write_bytes(file.read(size))
