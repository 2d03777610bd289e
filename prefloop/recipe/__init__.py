"""A recipe holds every option of a run: read from YAML, overridden, checked, dumped with all values.

A method's own `defaults` (its paper's schedule) are laid under what the file says, so a short recipe
is the paper's setting and a dumped one shows every value. Paths in a recipe are relative to the
working directory, not to the recipe's file, as with TRL and axolotl.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    Field,
    FieldSerializationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

import prefloop.generate.engines
import prefloop.judges
import prefloop.methods
from prefloop.config import (
    SHIPPED,
    Options,
    build,
    build_plugin,
    dump_yaml,
    here_or_shipped,
    model_in,
    plugin_name,
    read_recipe,
    read_yaml,
)
from prefloop.data.prompts import DataOptions
from prefloop.errors import RecipeError, nearest
from prefloop.generate.engine import EngineOptions
from prefloop.generate.engines.hf import InProcess
from prefloop.judges import Judge
from prefloop.methods import Method
from prefloop.models.sources import ModelOptions
from prefloop.recipe.options import (
    EvaluateOptions,
    GenerateOptions,
    GuardOptions,
    LaunchOptions,
    LoopOptions,
    RewardStep,
    TrackOptions,
)
from prefloop.run_folder import RunDir
from prefloop.train.options import SftOptions, TrainOptions

M = TypeVar("M", bound=BaseModel)

JUDGES = ("judge", "eval_judge")
"""Sections that name a judge."""

_HOMES = {
    "method": prefloop.methods,
    **dict.fromkeys(JUDGES, prefloop.judges),
    "engine": prefloop.generate.engines,
}


class Recipe(Options):
    """Every option of a run. Sections may be given as mappings or as their objects.

    In Python a mistake raises pydantic's ValidationError; `load_recipe` makes one sentence of it.
    """

    name: str = Field(strict=True)
    """The run's name and its folder's, runs/NAME; the recipe file's stem where it is left out."""
    seed: int = Field(default=0, ge=0, lt=2**63, strict=True)
    """Fixes every random number of the run."""
    model: ModelOptions = Field(default_factory=ModelOptions)
    """The policy to train."""
    data: DataOptions = Field(default_factory=DataOptions)
    """Prompts for training and evaluation; files are relative to the working directory."""
    method: Method
    """`name` of the method (a file of prefloop.methods, or your.module) and its options."""
    judge: Judge | None = None
    """`name` of the judge (a file of prefloop.judges, or your.module) and its options."""
    eval_judge: Judge | None = None
    """The judge of held-out answers (score, win_rate), one that took no part in training; null takes `judge`."""
    engine: EngineOptions = Field(default_factory=InProcess)
    """`name` of what generates (a file of prefloop.generate.engines, or your.module) and its options."""
    generate: GenerateOptions = Field(default_factory=GenerateOptions)
    """How text is generated."""
    loop: LoopOptions = Field(default_factory=LoopOptions)
    """The closed loop's schedule."""
    sft: SftOptions | None = None
    """Supervised fine-tuning as round 0 (IAL's initiation); null leaves it out."""
    train: TrainOptions = Field(default_factory=TrainOptions)
    """How a round's pairs become a new policy."""
    evaluate: EvaluateOptions = Field(default_factory=EvaluateOptions)
    """What is measured on held-out prompts."""
    guard: GuardOptions = Field(default_factory=GuardOptions)
    """What counts as collapse, and what is done about it."""
    reward: RewardStep | None = None
    """A reward model to be made first, from pairs of drafts that another judge labels (RLAIF); null makes none."""
    launch: LaunchOptions | None = None
    """Train, and generate, in several processes; null does all in the run's own."""
    track: TrackOptions = Field(default_factory=TrackOptions)
    """Experiment trackers, through accelerate; a list is short for their names."""

    @model_validator(mode="before")
    @classmethod
    def _build_sections(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "method" not in values:
            return values
        built = dict(values)
        method = built["method"] = build_plugin(
            prefloop.methods, values["method"], Method, "method"
        )
        built |= {
            section: build_plugin(prefloop.judges, built[section], Judge, section)
            for section in JUDGES
            if built.get(section) is not None
        }
        if isinstance(built.get("track"), str | list | tuple):
            built["track"] = {"report_to": built["track"]}
        if "engine" in built:
            engines = prefloop.generate.engines
            built["engine"] = build_plugin(engines, built["engine"], EngineOptions, "engine")
        for section, defaults in method.defaults.items():
            given = built.get(section, {})
            if isinstance(given, Mapping):
                built[section] = {**defaults, **given}
        for section, field in cls.model_fields.items():
            kind = model_in(field.annotation)
            optional = type(None) in get_args(field.annotation)
            if kind is None or section not in built or (optional and built[section] is None):
                continue
            if not isinstance(built[section], kind):
                built[section] = build(kind, built[section], section)
        return built

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[^\W_][\w.-]*", name):
            raise ValueError(
                f"{name!r} cannot name the run's folder; "
                "use letters, digits, '_', '-' and '.', beginning with a letter or digit"
            )
        return name

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.guard.action == "best_round" and not self.evaluate.every_round:
            raise RecipeError("guard.action best_round needs evaluate.every_round: true")
        if self.guard.action == "best_round" and self.answers_judge is None:
            raise RecipeError(
                "guard.action best_round needs a judge to score the rounds; add a section judge"
            )
        if self.reward is not None and "model" not in (self.judge.sources if self.judge else {}):
            raise RecipeError(
                "reward makes a model for the judge; add judge: {name: reward_model, model: rewards/NAME}"
            )
        if self.launch is not None and self.model.device not in ("auto", "cpu"):
            raise RecipeError(
                "launch gives each process a device of its own, so model.device should be auto or "
                f"cpu; it is {self.model.device!r}"
            )
        if (
            self.launch is not None
            and self.launch.generate
            and not isinstance(self.engine, InProcess)
        ):
            raise RecipeError(
                "launch.generate shares generation in process, and the recipe's engine generates "
                "elsewhere; set launch.generate to false"
            )
        if self.sft and self.sft.batch_size % self.train.micro_batch_size:
            raise RecipeError(
                f"train.micro_batch_size ({self.train.micro_batch_size}) must divide "
                f"sft.batch_size ({self.sft.batch_size}); change one of them"
            )
        return self

    @field_serializer("method", *JUDGES, "engine")
    def _with_name(
        self, plugin: Method | Judge | EngineOptions | None, info: FieldSerializationInfo
    ) -> dict[str, Any] | None:
        if plugin is None:
            return None
        home = _HOMES[info.field_name]
        return {"name": plugin_name(home, plugin), **plugin.model_dump(mode="json")}

    @property
    def needs_target(self) -> bool:
        """Whether every prompt must have a target response: for the method, round 0 or the judge."""
        judges = any(judge.needs_target for judge in self.judges.values())
        return self.method.needs_target or self.sft is not None or judges

    @property
    def judges(self) -> dict[str, Judge]:
        """Section -> judge, of those that the recipe names."""
        found = {section: getattr(self, section) for section in JUDGES}
        return {section: judge for section, judge in found.items() if judge is not None}

    @property
    def answers_judge(self) -> Judge | None:
        """The judge of held-out answers."""
        return self.eval_judge or self.judge

    @property
    def judge_sources(self) -> dict[str, str]:
        """Option, such as "judge.model" -> the folder or Hub id that a judge loads."""
        return {
            f"{section}.{option}": source
            for section, judge in self.judges.items()
            for option, source in judge.sources.items()
        }

    @property
    def sft_train(self) -> TrainOptions | None:
        """How round 0 trains: `train` with what `sft` says instead; None without round 0."""
        return self.train.model_copy(update=self.sft.model_dump()) if self.sft else None

    def dump(self) -> str:
        """The recipe as YAML with every value; loading it gives an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a file, or the NAME of recipes/NAME.yaml here or among those shipped.

    `overrides` are "section.key=value" with the value written as YAML. Raises RecipeError.
    """
    path = _recipe_path(path_or_name)
    try:
        return read_recipe(path, Recipe, overrides, needs="method")
    except RecipeError as error:
        if "variants" in read_yaml(path, needs="method"):
            raise RecipeError(
                f"{path} is a comparison; play it with prefloop compare {path}"
            ) from error
        raise


def shipped_recipes() -> dict[str, Path]:
    """Recipes that can be loaded by name; the working directory's hide shipped ones."""
    folders = (SHIPPED, Path(SHIPPED.name))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def _recipe_path(path_or_name: str) -> Path:
    path = here_or_shipped(Path(path_or_name))
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        beside = sorted(str(other) for other in path.parent.glob("*.y*ml") if other.is_file())
        raise RecipeError(f"no file {path}" + (f"; {nearest(str(path), beside)}" if beside else ""))
    recipes = shipped_recipes()
    if path_or_name not in recipes:
        if (inside := path / "recipe.yaml").is_file():
            raise RecipeError(f"{path} is a run; its recipe is {inside}")
        if path.is_dir():
            raise RecipeError(
                f"{path} is a folder, and no run (it has no recipe.yaml); name a recipe or a run's folder"
            )
        if len(path.parts) > 1:
            raise RecipeError(f"no recipe's file and no run {path}; a run is a folder below runs/")
        raise RecipeError(f"no recipe {path_or_name!r}; {nearest(path_or_name, sorted(recipes))}")
    return recipes[path_or_name]


DTYPE = "model.dtype"
"""Among a run's inputs: what `auto` became when it began."""


def initial_source(recipe: Recipe, run: RunDir) -> ModelOptions:
    """The recipe's model, in the dtype in which the run began; after round 0 its supervised fine-tune takes its place."""
    model = recipe.model.model_copy(update={"dtype": dtype_of_run(recipe, run) or "auto"})
    start = run.round(-1)
    if recipe.sft is not None and start.manifest("sft"):
        start.verify_policy()
        return model.model_copy(update={"source": str(start.policy.resolve())})
    return model


def dtype_of_run(recipe: Recipe, run: RunDir) -> str | None:
    """The dtype of a run's frozen weights, on whatever machine it goes on; None before it has begun."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    known = run.inputs()
    if not known or DTYPE in known:
        return str(known[DTYPE]) if known else None
    # Begun before it was noted, when "auto" was float32 on every CPU.
    device = recipe.model.device
    on_cuda = device.startswith("cuda") or (
        device == "auto" and known.get("device", "cpu") != "cpu"
    )
    return "bfloat16" if on_cuda and recipe.model.tuning == "lora" else "float32"


def against_bfloat16(recipe: Recipe) -> str | None:
    """What, outside its section model, keeps a recipe from bfloat16 on a CPU under `dtype: auto`."""
    if recipe.sft is not None:
        return "sft merges its adapter into the weights, and bfloat16 would round it away"
    launch = recipe.launch
    if launch is not None and (launch.sharding != "none" or launch.command is not None):
        return "weights that are sharded have their adapter beside them, and bfloat16 would round it away"
    return None
