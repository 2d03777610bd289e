"""A comparison file: a base recipe, variants of it, seeds, a budget; and its cells (variant times seed).

How policies are measured must be the same in all variants.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

import prefloop.judges
import prefloop.methods
from prefloop.compare.judged import COLUMNS
from prefloop.config import (
    Options,
    build,
    build_plugin,
    find_plugin,
    here_or_shipped,
    overridden,
    plugin_name,
    read_yaml,
    sentence,
)
from prefloop.errors import RecipeError, nearest
from prefloop.judges import Judge
from prefloop.methods import Method
from prefloop.recipe import Recipe, load_recipe, shipped_recipes
from prefloop.recipe.check import check_sources
from prefloop.recipe.options import Budget
from prefloop.report.meanings import OF_METHODS, measure_names
from prefloop.run.cost import SECONDS

_PLUGINS: dict[str, tuple[Any, type[BaseModel]]] = {
    "method": (prefloop.methods, Method),
    "judge": (prefloop.judges, Judge),
}
_JUDGED = ("score", "win_rate")


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Comparison(Options):
    """The contents of a comparison file."""

    base: str | dict[str, Any]
    """The recipe that variants vary: a file, the name of a shipped one, or a recipe's sections themselves."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(_tuple)] = (
        Field(default=(0, 1, 2), min_length=1)
    )
    """Seeds that every variant is run with. One seed cannot tell a difference from noise."""
    variants: dict[str, dict[str, Any] | None] = Field(min_length=1)
    """Name -> changes to the base: "section.key" or a whole section -> value."""
    budget: Budget | None = None
    """What each cell may spend, generated_tokens, trained_tokens, seconds or flops; null: all rounds."""
    measures: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = Field(
        default=("score", "win_rate", "kl", "mean_length", "stop_rate"), min_length=1
    )
    """Columns of the table: measures of the last round."""
    by_round: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = ()
    """Measures of a second table that has a row for each measured round, with each round's seconds."""
    judges: dict[str, Judge] = Field(default_factory=dict)
    """Further judges of the last round's held-out answers, by a name of yours; they take no part in training.
    Their columns are score_by_NAME and win_rate_by_NAME."""
    rank_by: str = "score"
    """The measure that variants are ranked by; highest first."""
    control: str | None = None
    """The variant that the others are compared with; the first where it is left out."""
    note: str = ""
    """A sentence that goes above the table, such as what the budget is, or why there is none."""

    @field_validator("variants")
    @classmethod
    def _names_are_folder_names(cls, variants: dict[str, Any]) -> dict[str, Any]:
        for name in variants:
            if not re.fullmatch(r"[^\W_][\w.-]*", name):
                raise ValueError(
                    f"variants: {name!r} cannot name a folder; use letters, digits, '_', '-' and '.'"
                )
        return variants

    @field_validator("judges", mode="wrap")
    @classmethod
    def _judges_are_built(cls, judges: object, handler: Any) -> object:
        if not isinstance(judges, Mapping):
            return handler(judges)
        built = {}
        for name, section in judges.items():
            if not re.fullmatch(r"[a-z0-9][\w-]*", str(name)):
                raise ValueError(
                    f"judges: {name!r} cannot name a column; use a-z, 0-9, '_' and '-'"
                )
            built[name] = build_plugin(prefloop.judges, section, Judge, f"judges.{name}")
            if built[name].needs_policy:
                raise ValueError(
                    f"judges.{name} asks the policy, and variants are not to judge themselves; "
                    "take a judge that asks none"
                )
        return built

    @model_validator(mode="after")
    def _columns_have_judges(self) -> Comparison:
        for measure in self.measures:
            name = judge_of(measure)
            if name is not None and name not in self.judges:
                hint = nearest(name, list(self.judges)) if self.judges else "judges names none"
                raise ValueError(
                    f"measures: {measure} is of a judge {name!r} that is not there; {hint}"
                )
        for measure in filter(judge_of, self.by_round):
            raise ValueError(
                f"by_round: {measure} is of a further judge, and those score the last round alone; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> Comparison:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds holds a seed twice ({list(self.seeds)}); name each once")
        if self.control is not None and self.control not in self.variants:
            hint = nearest(self.control, list(self.variants))
            raise ValueError(f"control {self.control!r} is no variant; {hint}")
        if self.rank_by not in self.measures:
            raise ValueError(
                f"rank_by {self.rank_by!r} is not among measures ({', '.join(self.measures)}); add it"
            )
        return self

    @property
    def control_name(self) -> str:
        """Name of the variant that the others are compared with."""
        return self.control or next(iter(self.variants))


def judge_of(measure: str) -> str | None:
    """The further judge whose column this is: NAME of "score_by_NAME"; None where it is a run's own measure."""
    head, by, name = measure.partition("_by_")
    return name if by and head in COLUMNS else None


@dataclass(frozen=True)
class Cell:
    """One variant with one seed: an ordinary run."""

    variant: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """The cell's name in messages and tables."""
        return f"{self.variant} seed {self.seed}"


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison file; recipes/compare/NAME.yaml is a shipped one unless it is here. Raises RecipeError.

    `overrides` are "section.key=value" and change the base, so every variant.
    """
    path = here_or_shipped(path)
    if not path.is_file():
        files = sorted(str(file) for file in path.parent.glob("*.y*ml"))
        raise RecipeError(f"no file {path}" + (f"; {nearest(str(path), files)}" if files else ""))
    try:
        values = read_yaml(path, needs="variants")
        if overrides and "base" in values:
            base = _base_values(values["base"])
            for override in overrides:
                base = overridden(base, override)
            values = {**values, "base": base}
        return build(Comparison, values, "")
    except RecipeError as error:
        message = str(error)
        raise RecipeError(
            message if message.startswith(str(path)) else f"{path}: {message}"
        ) from None


def cells(comparison: Comparison, folder: Path) -> tuple[list[Cell], list[str]]:
    """All cells, seed by seed, and notes for the user. Raises RecipeError."""
    base = _base_values(comparison.base)
    notes, recipes = [], {}
    for variant, changes in comparison.variants.items():
        values, variant_notes = _apply_changes(base, changes or {})
        notes += [f"variant {variant}: {sentence}" for sentence in variant_notes]
        for seed in comparison.seeds:
            recipes[variant, seed] = _recipe(values, variant, seed, comparison.budget)
    _check_same_protocol(comparison, recipes)
    notes += _check_measures(comparison, list(recipes.values()))
    if len(comparison.seeds) == 1:
        notes.append("one seed: no difference between variants can be told from luck")
    return [
        Cell(variant, seed, recipes[variant, seed], folder / variant / f"seed-{seed}")
        for seed in comparison.seeds
        for variant in comparison.variants
    ], notes


def check_judges(comparison: Comparison) -> list[str]:
    """Look for what would stop the further judges after all cells are played; notes. Raises PrefloopError."""
    sources: dict[str, str] = {}
    for name, judge in comparison.judges.items():
        judge.check()
        sources |= {f"judges.{name}.{option}": model for option, model in judge.sources.items()}
    return list(check_sources(sources))


def _base_values(base: object) -> dict[str, Any]:
    """The base recipe as written, without defaults: those depend on each variant's method."""
    if isinstance(base, dict):
        return base
    load_recipe(str(base))  # raises a clear error where the base itself is wrong
    path = Path(str(base))
    return read_yaml(path if path.is_file() else shipped_recipes()[str(base)], needs="method")


def _apply_changes(
    base: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The base with a variant's changes, and notes on options dropped as another method or judge lacks them."""
    values, notes = dict(base), []
    for section, (package, kind) in _PLUGINS.items():
        name, old = changes.get(f"{section}.name"), values.get(section)
        if not isinstance(name, str) or not isinstance(old, Mapping) or name == old.get("name"):
            continue
        known = find_plugin(package, name, kind, section).model_fields
        dropped = [key for key in old if key != "name" and key not in known]
        values[section] = {key: value for key, value in old.items() if key not in dropped}
        if dropped:
            notes.append(f"{name} has no {', '.join(dropped)}: left out of the base's {section}")
    for key, value in changes.items():
        if key.partition(".")[0] in ("seed", "name"):
            raise RecipeError(f"variants: {key} is set by the comparison; leave it out")
        values = overridden(values, f"{key}={json.dumps(value)}")
    return values, notes


def _recipe(values: Mapping[str, Any], variant: str, seed: int, budget: Budget | None) -> Recipe:
    values = {**values, "name": f"{variant}-seed-{seed}", "seed": seed}
    loop = values.get("loop") or {}
    if isinstance(loop, Mapping):  # else the recipe's own validation reports it
        if loop.get("budget") is not None:
            raise RecipeError(
                f"variant {variant} has a loop.budget of its own; say budget once, for all"
            )
        if budget is not None:
            values["loop"] = {**loop, "budget": budget.limits}
    try:
        return Recipe.model_validate(values)
    except ValueError as error:
        message = sentence(error, Recipe) if isinstance(error, ValidationError) else str(error)
        raise RecipeError(f"variant {variant}: {message}") from None


def protocol(recipe: Recipe) -> dict[str, Any]:
    """The options that decide how a policy is measured, and on which prompts."""
    data = recipe.data
    prompts = {"eval": data.eval, "holdout": data.holdout}
    if data.eval is None:
        prompts |= {"train": data.train, "limit": data.limit}
    sampling = recipe.evaluate.sampling or recipe.method.sampling
    return {
        "data": prompts,
        "evaluate": {
            **recipe.evaluate.model_dump(exclude={"every_round", "introspection"}),
            "sampling": sampling,
        },
    }


def _check_measures(comparison: Comparison, recipes: Sequence[Recipe]) -> list[str]:
    """RecipeError for a measure that no round has; only a note where a method of the user's own may report it."""
    known = measure_names(title for recipe in recipes for title in recipe.data.eval_set_names())
    methods = {plugin_name(prefloop.methods, recipe.method) for recipe in recipes}
    own = sorted(name for name in methods if "." in name)
    # Read from the methods' code, as they declare nowhere what they report.
    told = "".join(
        inspect.getsource(type(recipe.method).measures)
        for recipe in recipes
        if recipe.evaluate.introspection and not own
    )
    notes = []
    for option in ("measures", "by_round"):
        seconds = SECONDS if option == "by_round" else ()
        for name in getattr(comparison, option):
            if name in OF_METHODS and not own and f'"{name}"' not in told:
                notes.append(
                    f"{option}: {name} stays empty, as no variant plays a method that reports it with "
                    "evaluate.introspection on"
                )
            if name in (*known, *seconds) or judge_of(name) is not None:
                continue
            if not own:
                raise RecipeError(
                    f"{option}: no round has a measure {name!r}; {_hint(name, known)}"
                )
            notes.append(f"{option}: {name} is empty unless {' or '.join(own)} reports it")
    return notes


def _hint(name: str, known: Sequence[str]) -> str:
    """The nearest measure; else the first ones and where the others are described."""
    hint = nearest(name, list(known))
    if hint.startswith("did"):
        return hint
    return f"there are {', '.join(known[:5])} and others, all in docs/metrics.md"


def _check_same_protocol(comparison: Comparison, recipes: Mapping[tuple[str, int], Recipe]) -> None:
    seed, control = comparison.seeds[0], comparison.control_name
    control_recipe = recipes[control, seed]
    for variant in comparison.variants:
        recipe = recipes[variant, seed]
        for section, values in protocol(control_recipe).items():
            for key, value in protocol(recipe)[section].items():
                if value == values[key]:
                    continue
                remedy = "; set it in the base" if key == "sampling" else ""
                raise RecipeError(
                    f"variants {variant} and {control} are measured differently ({section}.{key}), so "
                    f"they cannot be compared{remedy}"
                )
        judged = [name for name in _JUDGED if name in comparison.measures]
        if recipe.answers_judge != control_recipe.answers_judge and judged:
            raise RecipeError(
                f"variants {variant} and {control} have different judges, so {judged[0]} means another "
                f"thing in each; take {' and '.join(judged)} out of measures, or give all one judge"
            )
