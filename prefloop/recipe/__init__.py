"""A recipe holds every option of a run: read from YAML, overridden, checked, dumped with all values.

A method's own `defaults` (its paper's schedule) are laid under what the file says, so a short recipe
is the paper's setting and a dumped one shows every value. Paths in a recipe are relative to the
working directory, not to the recipe's file, as with TRL and axolotl.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FieldSerializationInfo,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

import prefloop.generate.engines
import prefloop.judges
import prefloop.methods
from prefloop.config import find, name_of, names, nearest
from prefloop.data.prompts import DataOptions
from prefloop.errors import RecipeError
from prefloop.generate.engines import EngineOptions
from prefloop.generate.engines.hf import InProcess
from prefloop.judges import Judge
from prefloop.methods import Method
from prefloop.models.sources import ModelOptions
from prefloop.recipe.check import check
from prefloop.records import Sampling, as_tuple
from prefloop.run.cost import Budget
from prefloop.run.launch import LaunchOptions
from prefloop.validation import build, model_in, sentence
from prefloop.yaml_text import dump_yaml, overridden, parse_yaml, shown

M = TypeVar("M", bound=BaseModel)
_HOMES = {
    "method": prefloop.methods,
    "judge": prefloop.judges,
    "engine": prefloop.generate.engines,
}
Tracker = Literal[
    "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"
]


class Section(BaseModel):
    """One section of the recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class GenerateOptions(Section):
    """How text is generated; what is generated is the method's."""

    batch_size: int = Field(default=64, ge=1)
    """Conversations decoded together; changes no answer in float32 on CPUs."""
    chunk_size: int = Field(default=64, ge=1)
    """Prompts a chunk: what a killed run loses at most, and what one seed covers."""


class LoopOptions(Section):
    """The closed loop's schedule."""

    rounds: int = Field(default=3, ge=1)
    """Times around the loop. IAL section 4.1: 3."""
    prompts_per_round: int = Field(default=64, ge=1)
    """Prompts that each round draws from the training data. IAL section 4.1: 50,000."""
    mix_previous: bool = False
    """Train on the previous round's pairs as well (IAL Algorithm 1: D'_t and D'_{t-1})."""
    carry_optimizer: bool = False
    """One optimiser and one schedule for the whole run (AROP), not a new one each round (IAL)."""
    lr_factors: Annotated[
        tuple[Annotated[float, Field(gt=0.0)], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = (1.0,)
    """What train.lr is multiplied by in each round; the last number holds for all that follow."""
    budget: Budget | None = None
    """What the run may spend: generated_tokens, trained_tokens, seconds or flops; null: all rounds."""

    def rate_factor(self, round: int) -> float:
        """What train.lr is multiplied by in this round."""
        return self.lr_factors[min(round, len(self.lr_factors) - 1)]


class SftOptions(Section):
    """Round 0: supervised fine-tuning on the data's targets. What is not here comes from `train`."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the training prompts. IAL appendix B.2.2: 2, for a baseline's SFT stage."""
    lr: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Peak learning rate. IAL appendix B.2.2: 2e-4, for a baseline's SFT stage."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per optimiser step."""


class TrainOptions(Section):
    """How a round's pairs become a new policy."""

    epochs: int = Field(default=1, ge=1)
    """Passes over a round's pairs. IAL section 4.1: 2."""
    lr: float = Field(default=5e-6, gt=0.0, le=1.0)
    """Peak learning rate. IAL section 4.1: 5e-7."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """IAL section 4.1: RMSProp."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up: to 0 on a line or a cosine, or not at all."""
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the optimiser steps in which the learning rate rises. IAL section 4.1: 10 %."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs per optimiser step. IAL appendix B: 4 x 8 accumulation steps."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Pairs per forward and backward pass; must divide batch_size."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    """Weight decay: decoupled under adamw, part of the gradient under rmsprop."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm."""
    packing: bool = True
    """Compute what a pair's responses share once, several pairs to a row, where the model allows."""
    token_budget: int = Field(default=2048, ge=1)
    """Tokens in a packed row."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """bf16: matrix products in bfloat16, also over float32 weights; auto: where the model is in bfloat16."""
    save_every: int = Field(default=0, ge=0)
    """Optimiser steps between training checkpoints; 0 saves only at the round's end."""

    @model_validator(mode="after")
    def _steps_are_whole(self) -> TrainOptions:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size ({self.micro_batch_size}) must divide "
                f"train.batch_size ({self.batch_size})"
            )
        return self


class EvaluateOptions(Section):
    """What is measured on held-out prompts."""

    prompts: int = Field(default=64, ge=1)
    """Held-out prompts answered for each measurement; fewer where the data hold fewer."""
    sampling: Sampling | None = None
    """How they are answered; null takes the method's sampling."""
    every_round: bool = True
    """Measure after each round, not only at the start and after the last."""
    every_steps: int = Field(default=0, ge=0)
    """Also measure the win rate against the start every so many optimiser steps; 0 does not."""
    introspection: bool = True
    """Play the whole method on these prompts too, for its own measures (R_i, identical rate ...)."""


class GuardOptions(Section):
    """What counts as collapse, and what is done about it."""

    action: Literal["warn", "stop", "best_round"] = "warn"
    """Warn, stop the run, or go on and give the best round's policy at the end."""
    max_kl: float = Field(default=2.0, gt=0.0)
    """Divergence from the initial policy, nats per token."""
    min_distinct2: float = Field(default=0.5, ge=0.0, le=1.0)
    """Distinct word bigrams, as a share of the initial policy's."""
    min_stop_rate: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of answers that end by themselves."""
    max_identical_rate: float = Field(default=0.9, ge=0.0, le=1.0)
    """Share of prompts with the rewrite equal to the draft. IAL appendix B.4: 3 to 5 % at T = 0.7."""
    max_reject_share: float = Field(default=0.95, ge=0.0, le=1.0)
    """Share of a round's prompts that gave no pair."""


class Recipe(Section):
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
    launch: LaunchOptions | None = None
    """Train, and generate, in several processes; null does all in the run's own."""
    track: tuple[Tracker, ...] = ()
    """Experiment trackers that accelerate reports to."""

    @model_validator(mode="before")
    @classmethod
    def _build_sections(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "method" not in values:
            return values
        built = dict(values)
        method = built["method"] = build_plugin(
            prefloop.methods, values["method"], Method, "method"
        )
        if built.get("judge") is not None:
            built["judge"] = build_plugin(prefloop.judges, built["judge"], Judge, "judge")
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
        if self.guard.action == "best_round" and self.judge is None:
            raise RecipeError(
                "guard.action best_round needs a judge to score the rounds; add a section judge"
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
                f"sft.batch_size ({self.sft.batch_size})"
            )
        return self

    @field_serializer("method", "judge", "engine")
    def _with_name(
        self, plugin: Method | Judge | EngineOptions | None, info: FieldSerializationInfo
    ) -> dict[str, Any] | None:
        if plugin is None:
            return None
        home = _HOMES[info.field_name]
        return {"name": name_of(home, plugin), **plugin.model_dump(mode="json")}

    @property
    def sft_train(self) -> TrainOptions | None:
        """How round 0 trains: `train` with what `sft` says instead; None without round 0."""
        return self.train.model_copy(update=self.sft.model_dump()) if self.sft else None

    def dump(self) -> str:
        """The recipe as YAML with every value; loading it gives an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))

    def check(self) -> list[str]:
        """Look for what would stop the run, loading no model; returns notes that need no change.

        Raises RecipeError or DataError: a judge or target that the method needs and has not, a
        prompt set, tracker or model folder that does not exist, data whose first rows do not parse.
        """
        return check(self)


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a file, or the NAME of recipes/NAME.yaml here or among those shipped.

    `overrides` are "section.key=value" with the value written as YAML. Raises RecipeError.
    """
    path = _recipe_path(path_or_name)
    return read_recipe(path, Recipe, overrides, needs="method")


def read_recipe(path: Path, kind: type[M], overrides: Sequence[str], *, needs: str) -> M:
    """A file as a recipe of one kind, overridden; RecipeError names file and overrides. `needs`: a section."""
    values = {"name": path.stem, **read_yaml(path, needs=needs)}
    source = str(path)
    for override in overrides:
        values = overridden(values, override)
        source += f" with --set {override}"
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source}: {sentence(error, kind)}") from None


def shipped_recipes() -> dict[str, Path]:
    """Recipes that can be loaded by name; the working directory's hide shipped ones."""
    package = Path(__file__).parents[1]
    folders = (package.parent / "recipes", package / "recipes", Path("recipes"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def _recipe_path(path_or_name: str) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        beside = sorted(str(other) for other in path.parent.glob("*.y*ml") if other.is_file())
        raise RecipeError(f"no file {path}" + (f"; {nearest(str(path), beside)}" if beside else ""))
    recipes = shipped_recipes()
    if path_or_name not in recipes:
        raise RecipeError(f"no recipe {path_or_name!r}; {nearest(path_or_name, sorted(recipes))}")
    return recipes[path_or_name]


def read_yaml(path: Path, *, needs: str) -> dict[str, Any]:
    """The mapping in a recipe file; RecipeError where it holds none. `needs` is a section it must have."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds {shown(values)}"
        raise RecipeError(f"{path} {what}; a recipe is a mapping with at least the section {needs}")
    return values


def build_plugin(package: ModuleType, value: object, base: type[M], what: str) -> M:
    """A method or judge from its section: `name` and its options. Raises RecipeError."""
    if isinstance(value, base):
        return value
    name = value.get("name") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(name, str):
        raise RecipeError(
            f"{what} should be a section with a name ({', '.join(names(package))}); "
            f"it is {shown(value)}"
        )
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise RecipeError(
            f"{what}.name {name!r} is neither one of {', '.join(names(package))} "
            "nor a module that can be imported, such as my_package.my_module"
        )
    options = {key: option for key, option in value.items() if key != "name"}
    return build(find(package, name, base, what), options, what)
