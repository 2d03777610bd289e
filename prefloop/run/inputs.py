"""Inputs of a run beside its recipe's text: the model's files, the template, the judge's, versions, threads."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import torch

from prefloop.machine import installed_versions
from prefloop.manifest import hash_file
from prefloop.models.sources import local_folder, resolve_source
from prefloop.recipe import Recipe
from prefloop.records import Prompt

_NOT_THE_MODEL = ("README.md", "training_args.json")


def inputs(recipe: Recipe) -> dict[str, str | int]:
    """What decides the run's numbers, by its name in the recipe; the data's rows are hashed when they are read."""
    folder = local_folder(resolve_source(recipe.model.source), recipe.model)
    identities: dict[str, str | int] = {"model.source": _contents(folder)}
    if recipe.model.chat_template is not None:
        identities["model.chat_template"] = _contents(Path(recipe.model.chat_template).expanduser())
    for option, source in recipe.judge_sources.items():
        path = Path(source).expanduser()
        if path.exists():
            identities[option] = _contents(path)
    return identities | {
        f"version of {name}": version for name, version in installed_versions().items()
    }


def surroundings() -> dict[str, str | int]:
    """What changes only the last digits of numbers; a change is reported, not refused."""
    return {
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def rows(prompts: Iterable[Prompt]) -> str:
    """A hash of prompts with their targets and labelled answers."""
    digest = blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(prompt.model_dump_json().encode() + b"\n")
    return digest.hexdigest()


def _contents(path: Path) -> str:
    """A hash of a file, or of a folder's files with their names."""
    if not path.is_dir():
        return hash_file(path)[:16]
    digest = blake2b(digest_size=8)
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and file.name not in _NOT_THE_MODEL:
            digest.update(f"{file.relative_to(path)}\0{hash_file(file)}\0".encode())
    return digest.hexdigest()
