"""Choose an evaluation's measures and their options: from a suite, a file, and --set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import prefloop.evaluate.measures as package
from prefloop.config import build, find_plugin, overridden, plugin_names, read_yaml, shown
from prefloop.errors import RecipeError, nearest
from prefloop.evaluate.measures import Measure, Suite

ALL = "all"
SUITES = (*get_args(Suite), ALL)
DEFAULT_SUITE = "quick"


@dataclass(frozen=True)
class ChosenMeasure:
    """A measure with its options, chosen for this evaluation."""

    name: str
    measure: Measure
    by_name: bool
    """Whether the user named it; a measure that only the suite names is skipped where it cannot run."""


def measure_names() -> list[str]:
    """All measures of this package."""
    return plugin_names(package)


def find_measure(name: str) -> type[Measure]:
    """The class of a measure, by its name or as a user's module. Raises RecipeError."""
    known = measure_names()
    if name not in known and "." not in name:
        raise RecipeError(f"no measure {name!r}; {nearest(name, known)}")
    return find_plugin(package, name, Measure, "measure")


def choose(
    suite: str | None,
    file: Path | None,
    overrides: Sequence[str],
    defaults: Mapping[str, Any],
) -> list[ChosenMeasure]:
    """The measures of a suite (quick, where none is named and there is no file), then those named by the user.

    `file` maps names to options; `overrides` are "measure.option=value"; `defaults` are set where a measure has
    such an option and neither gives it a value. Raises RecipeError.
    """
    if suite is not None and suite not in SUITES:
        raise RecipeError(f"no suite {suite!r}; {nearest(suite, list(SUITES))}")
    options: dict[str, Any] = {}
    if file is not None:
        options = {name: given or {} for name, given in _read(file).items()}
    for override in overrides:
        options = _overridden(options, override)
    named = list(options)
    members: list[str] = []
    if file is None or suite is not None:
        members = _members(suite or DEFAULT_SUITE)
    return [
        ChosenMeasure(name, _built(name, options.get(name, {}), defaults), name in named)
        for name in dict.fromkeys([*members, *named])
    ]


def _members(suite: str) -> list[str]:
    return [name for name in measure_names() if suite == ALL or suite in find_measure(name).suites]


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise RecipeError(f"no file {file}; name a YAML file of measures and their options")
    return read_yaml(file, needs="win_rate or of another measure")


def _overridden(options: Mapping[str, Any], override: str) -> dict[str, Any]:
    if "." not in override.partition("=")[0]:
        raise RecipeError(f"--set {override} is not of the form measure.option=value")
    return overridden(options, override)


def _built(name: str, given: Any, defaults: Mapping[str, Any]) -> Measure:
    kind = find_measure(name)
    if not isinstance(given, Mapping):
        raise RecipeError(f"{name} should be a section of options; it is {shown(given)}")
    taken = {key: value for key, value in defaults.items() if key in kind.model_fields}
    return build(kind, {**taken, **given}, name)
