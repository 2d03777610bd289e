"""A recipe holds every option of a run: read from YAML, overridden, checked, dumped with all values.

A method's own `defaults` (its paper's schedule) are laid under what the file says, so a short recipe
is the paper's setting and a dumped one shows every value. Paths in a recipe are relative to the
working directory, not to the recipe's file, as with TRL and axolotl.
"""

from __future__ import annotations

import json
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from importlib.util import find_spec
from itertools import islice
from operator import or_
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_serializer,
    field_validator,
    model_validator,
)
from yaml import MarkedYAMLError

import prefloop.methods
import prefloop.rank
from prefloop.data import EMBEDDED as EMBEDDED_DATA
from prefloop.data import READERS, DataOptions, read_prompts
from prefloop.errors import RecipeError
from prefloop.generate.templates import PromptSet
from prefloop.methods import Method
from prefloop.plugins import find, names, nearest
from prefloop.rank import Judge
from prefloop.records import Sampling
from prefloop.train.sources import EMBEDDED as EMBEDDED_MODELS
from prefloop.train.sources import ModelOptions

M = TypeVar("M", bound=BaseModel)
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

    batch_size: int = Field(default=32, ge=1)
    """Rows decoded together."""
    chunk_size: int = Field(default=32, ge=1)
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


class SftOptions(Section):
    """Round 0: supervised fine-tuning on the data's targets. What is not here comes from `train`."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the training prompts. IAL appendix C: 2."""
    lr: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Peak learning rate. IAL appendix C: 2e-4, with LoRA."""
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
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm."""
    packing: bool = True
    """Compute what a pair's responses share once, several pairs to a row, where the model allows."""
    token_budget: int = Field(default=2048, ge=1)
    """Tokens in a packed row."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: matrix products in bfloat16 over float32 weights, for full fine-tuning."""
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
    seed: int = Field(default=0, ge=0, strict=True)
    """Fixes every random number of the run."""
    model: ModelOptions = Field(default_factory=ModelOptions)
    """The policy to train."""
    data: DataOptions = Field(default_factory=DataOptions)
    """Prompts for training and evaluation; files are relative to the working directory."""
    method: Method
    """`name` of the method (a file of prefloop.methods, or your.module) and its options."""
    judge: Judge | None = None
    """`name` of the judge (a file of prefloop.rank, or your.module) and its options."""
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
    track: tuple[Tracker, ...] = ()
    """Experiment trackers that accelerate reports to."""

    @model_validator(mode="before")
    @classmethod
    def _build_sections(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "method" not in values:
            return values
        built = dict(values)
        method = built["method"] = _plugin(prefloop.methods, values["method"], Method, "method")
        if built.get("judge") is not None:
            built["judge"] = _plugin(prefloop.rank, built["judge"], Judge, "judge")
        for section, defaults in method.defaults.items():
            given = built.get(section, {})
            if isinstance(given, Mapping):
                built[section] = {**defaults, **given}
        for section, field in cls.model_fields.items():
            kind = _model_in(field.annotation)
            optional = type(None) in get_args(field.annotation)
            if kind is None or section not in built or (optional and built[section] is None):
                continue
            if not isinstance(built[section], kind):
                built[section] = _build(kind, built[section], section)
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
        if self.sft and self.sft.batch_size % self.train.micro_batch_size:
            raise RecipeError(
                f"train.micro_batch_size ({self.train.micro_batch_size}) must divide "
                f"sft.batch_size ({self.sft.batch_size})"
            )
        return self

    @field_serializer("method", "judge")
    def _with_name(self, plugin: Method | Judge | None) -> dict[str, Any] | None:
        if plugin is None:
            return None
        return {"name": plugin_name(plugin), **plugin.model_dump(mode="json")}

    @property
    def sft_train(self) -> TrainOptions | None:
        """How round 0 trains: `train` with what `sft` says instead; None without round 0."""
        return self.train.model_copy(update=self.sft.model_dump()) if self.sft else None

    def dump(self) -> str:
        """The recipe as YAML with every value; loading it gives an equal recipe."""
        values = self.model_dump(mode="json")
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def check(self) -> list[str]:
        """Look for what would stop the run, loading no model; returns notes that need no change.

        Raises RecipeError or DataError: a judge or target that the method needs and has not, a
        prompt set, tracker or model folder that does not exist, data whose first rows do not parse.
        """
        PromptSet(self.method.prompt_set)
        method = plugin_name(self.method)
        if self.method.needs_judge and self.judge is None:
            raise RecipeError(
                f"method {method!r} needs a judge; add a section judge with a name "
                f"({', '.join(names(prefloop.rank))})"
            )
        for tracker in self.track:
            if find_spec(tracker) is None:
                raise RecipeError(
                    f"track names {tracker}, which is not installed; pip install {tracker}"
                )
        return [*_check_models(self), *_check_data(self), *_without_effect(self)]


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a file, or the NAME of recipes/NAME.yaml here or among those shipped.

    `overrides` are "section.key=value" with the value written as YAML. Raises RecipeError.
    """
    path = _recipe_path(path_or_name)
    values = {"name": path.stem, **_read_yaml(path)}
    source = str(path)
    for override in overrides:
        values = _override(values, override)
        source += f" with --set {override}"
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_sentence(error, Recipe)}") from None


def shipped_recipes() -> dict[str, Path]:
    """Recipes that can be loaded by name; the working directory's hide shipped ones."""
    package = Path(__file__).parent
    folders = (package.parent / "recipes", package / "recipes", Path("recipes"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def plugin_name(plugin: Method | Judge) -> str:
    """The name under which a recipe finds a method or judge."""
    home = prefloop.methods if isinstance(plugin, Method) else prefloop.rank
    return type(plugin).__module__.removeprefix(f"{home.__name__}.")


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, with the options of every method and judge of this package."""
    methods = _alternatives(prefloop.methods, Method, "method")
    judges = _alternatives(prefloop.rank, Judge, "judge")
    full = create_model(
        "Recipe", __base__=Recipe, method=(methods, ...), judge=(judges | None, None)
    )
    schema = full.model_json_schema()
    schema["required"].remove("name")  # load_recipe takes the file's stem
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _Dumper(yaml.SafeDumper):
    """Quotes text that _Loader would read as a number, and escapes what it would fold as a line break."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        """PyYAML writes Unicode's line breaks as they are, and reads them back as spaces."""
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: 5e-7 is a number, dates are text, a key given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Keys are looked at here, before merges (<<) legitimately repeat them."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+\Z", re.ASCII)
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: str(node.value))


def _recipe_path(path_or_name: str) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        beside = sorted(str(other) for other in path.parent.glob("*.y*ml"))
        raise RecipeError(f"no file {path}" + (f"; {nearest(str(path), beside)}" if beside else ""))
    recipes = shipped_recipes()
    if path_or_name not in recipes:
        raise RecipeError(f"no recipe {path_or_name!r}; {nearest(path_or_name, sorted(recipes))}")
    return recipes[path_or_name]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds {_shown(values)}"
        raise RecipeError(f"{path} {what}; a recipe is a mapping with at least the section method")
    return values


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        remedy = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise RecipeError(f"{source}{where}: {error.problem}{remedy}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{source}:{line}: {error.reason} ({text[error.position]!r})") from None


def _override(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override} is not of the form section.key=value")
    return _with(values, keys, _parse_yaml(text, f"--set {override}"), override)


def _with(values: Mapping[str, Any], keys: list[str], new: Any, override: str) -> dict[str, Any]:
    head, *rest = keys
    if not rest:
        return {**values, head: new}
    child = values.get(head)
    if not isinstance(child, Mapping | None):
        raise RecipeError(f"--set {override}: {head} is {_shown(child)}, not a section")
    return {**values, head: _with(child or {}, rest, new, override)}


def _plugin(package: ModuleType, value: object, base: type[M], what: str) -> M:
    if isinstance(value, base):
        return value
    name = value.get("name") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(name, str):
        raise RecipeError(
            f"{what} should be a section with a name ({', '.join(names(package))}); "
            f"it is {_shown(value)}"
        )
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise RecipeError(
            f"{what}.name {name!r} is neither one of {', '.join(names(package))} "
            "nor a module that can be imported, such as my_package.my_module"
        )
    options = {key: option for key, option in value.items() if key != "name"}
    return _build(find(package, name, base, what), options, what)


def _build(kind: type[M], values: object, where: str) -> M:
    """Validate as JSON: strictly ("yes" is not 1), yet a list passes for a tuple."""
    try:
        return kind.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(_sentence(error, kind, where)) from None


def _sentence(error: ValidationError, kind: type[BaseModel], where: str = "") -> str:
    """The first error in words; a misspelt key explains a missing one, so it goes first."""
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, RecipeError):
        return str(raised)
    path, inside = _walk(first["loc"], kind, where)
    if first["type"] == "extra_forbidden":
        at = f" in {path}" if path else ""
        key = str(first["loc"][-1])
        return f"unknown key {key!r}{at}; {nearest(key, list(inside.model_fields))}"
    if raised is not None:
        return str(raised) if str(raised).startswith(path) else f"{path}: {raised}"
    if first["type"] == "missing":
        return f"{path} is missing"
    if first["type"] == "model_type":
        return f"{path} should be a section of keys; it is {_shown(first['input'])}"
    says = first["msg"].removeprefix("Input ").replace("a valid tuple", "a list")
    return f"{path} {says[0].lower()}{says[1:]}; it is {_shown(first['input'])}"


def _walk(
    loc: Sequence[int | str], kind: type[BaseModel], where: str
) -> tuple[str, type[BaseModel]]:
    """The dotted path of an error and the model it ends in; pydantic's tags of unions are left out."""
    path, inside = where, kind
    for part in loc:
        field = inside.model_fields.get(str(part))
        if isinstance(part, int):
            path += f"[{part}]"
        elif field is not None:
            path = f"{path}.{part}" if path else part
            inside = _model_in(field.annotation) or inside
    return path, inside


def _model_in(annotation: Any) -> type[BaseModel] | None:
    kinds = (annotation, *get_args(annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _alternatives(package: ModuleType, base: type[M], what: str) -> Any:
    sections = []
    for name in names(package):
        kind = find(package, name, base, what)
        fields: dict[str, Any] = {"name": (Literal[name], ...)}
        sections.append(create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **fields))
    return reduce(or_, sections)


def _check_models(recipe: Recipe) -> Iterator[str]:
    """Models are looked at by name only; a name that is no folder here is the hub's."""
    sources = {
        "model.source": recipe.model.source,
        "judge.model": getattr(recipe.judge, "model", None),
    }
    for key, source in sources.items():
        if not isinstance(source, str) or Path(source).expanduser().is_dir():
            continue
        if source.startswith("embedded:"):
            embedded = source.removeprefix("embedded:")
            if embedded not in EMBEDDED_MODELS:
                hint = nearest(embedded, list(EMBEDDED_MODELS))
                raise RecipeError(f"{key}: no embedded model {embedded!r}; {hint}")
        elif source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise RecipeError(
                f"{key}: no folder {source} (paths are relative to the working directory)"
            )
        else:
            yield f"{key} {source} is no folder here: it will be looked up on the Hugging Face Hub"


def _check_data(recipe: Recipe) -> Iterator[str]:
    """Parse as many rows as the first round needs: a short read also tells that there are too few."""
    data, size = recipe.data, recipe.loop.prompts_per_round
    plugins = (recipe.method, recipe.judge) if recipe.judge else (recipe.method,)
    needs_target = recipe.sft is not None or any(plugin.needs_target for plugin in plugins)
    if _on_the_hub(data.train):
        yield f"data.train {data.train} is not here: it will be looked up on the Hugging Face Hub"
    else:
        prompts = read_prompts(data.train, data, needs_target=needs_target)
        found = sum(1 for _ in islice(prompts, min(size + data.holdout, sys.maxsize)))
        usable = min(found, data.limit or found) - data.holdout
        if usable < size:
            raise RecipeError(
                f"loop.prompts_per_round is {size}, and data.train leaves {max(usable, 0)} "
                "to train on; lower it, or give more data"
            )
    if data.eval is None and not data.holdout and data.train != EMBEDDED_DATA:
        if recipe.guard.action == "best_round":
            raise RecipeError(
                "guard.action best_round needs held-out prompts; set data.eval or data.holdout"
            )
        yield "no held-out prompts: set data.eval or data.holdout to measure on new prompts"
    elif data.eval is not None and _on_the_hub(data.eval):
        yield f"data.eval {data.eval} is not here: it will be looked up on the Hugging Face Hub"
    elif data.eval is not None:
        prompts = read_prompts(data.eval, data, part="eval", needs_target=needs_target)
        deque(islice(prompts, recipe.evaluate.prompts), maxlen=0)


def _on_the_hub(source: str) -> bool:
    path = Path(source).expanduser()
    here = source.startswith((".", "embedded:")) or path.suffix in READERS or path.exists()
    return not here and source.count("/") == 1


def _without_effect(recipe: Recipe) -> Iterator[str]:
    """Settings that change nothing in this recipe, or fight each other."""
    method, loop, train = recipe.method, recipe.loop, recipe.train
    if recipe.judge and not method.needs_judge:
        yield (
            f"judge: method {plugin_name(method)} ranks without it; "
            "it only scores the held-out answers"
        )
    for option in ("mix_previous", "carry_optimizer"):
        if loop.rounds == 1 and getattr(loop, option):
            yield f"loop.{option} has no effect in a single round"
    if loop.prompts_per_round < train.batch_size:
        yield (
            f"loop.prompts_per_round ({loop.prompts_per_round}) is less than "
            f"train.batch_size ({train.batch_size}): each epoch is one smaller step"
        )
    if method.generator == "frozen" and method.reference == "round_start":
        yield (
            "method.generator frozen with method.reference round_start: "
            "answers come from the initial policy, the loss is measured from the round's"
        )
