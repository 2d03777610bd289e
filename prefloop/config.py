"""Options: strict sections, the YAML they are written in, the plug-ins they name, and mistakes in one sentence."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
)
from yaml import MarkedYAMLError

from prefloop.errors import RecipeError, failure, nearest


def parse_yaml(text: str, source: str) -> Any:
    """The value that YAML text stands for; RecipeError names `source`, line and column of a mistake."""
    try:
        value = yaml.load(text, Loader=_Loader)
        # ValueError where an alias stands inside its own anchor, or aliases of aliases would fill the memory.
        _count(value, set(), {})
        return value
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        remedy = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise RecipeError(f"{source}{where}: {error.problem}{remedy}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{source}:{line}: {error.reason} ({text[error.position]!r})") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # of a tag such as !!int, or of a nesting without end
        raise RecipeError(
            f"{source} holds what cannot be read ({error}); write it plainly"
        ) from None


_MOST_VALUES = 10**6


def _count(value: object, around: set[int], counted: dict[int, int]) -> int:
    """How many values there are once aliases are written out; ValueError where there is no end to them."""
    if not isinstance(value, dict | list):
        return 1
    place = id(value)
    if place in around:
        raise ValueError("an alias inside its own anchor")
    if place not in counted:
        so_far = 1
        for inner in value.values() if isinstance(value, dict) else value:
            so_far += _count(inner, around | {place}, counted)
        if so_far > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES:,} values, once its aliases are written out")
        counted[place] = so_far
    return counted[place]


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text in the mapping's order; `parse_yaml` gives the same values back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def overridden(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """`values` with one "section.key=value" set, the value written as YAML; RecipeError where it cannot be."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override} is not of the form section.key=value")
    return _with(values, keys, parse_yaml(text, f"--set {override}"), override)


def _with(values: Mapping[str, Any], keys: list[str], new: Any, override: str) -> dict[str, Any]:
    head, *rest = keys
    if not rest:
        return {**values, head: new}
    child = values.get(head)
    if not isinstance(child, Mapping | None):
        raise RecipeError(f"--set {override}: {head} is {shown(child)}, not a section")
    return {**values, head: _with(child or {}, rest, new, override)}


def shown(value: object) -> str:
    """A value as an error message quotes it."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


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

M = TypeVar("M", bound=BaseModel)

SHIPPED = Path(__file__).parent / "recipes"
"""Recipes that come with the package, and with them comparisons, reward recipes and launcher configs."""


def here_or_shipped(path: Path) -> Path:
    """The path; for one below recipes/ that is not here, the shipped file of that name where there is one."""
    shipped = SHIPPED.parent / path
    below = path.parts[:1] == (SHIPPED.name,) and ".." not in path.parts
    return shipped if below and not path.exists() and shipped.is_file() else path


def build(kind: type[M], values: object, where: str) -> M:
    """Validate as JSON: strictly ("yes" is not 1), yet a list passes for a tuple."""
    try:
        return kind.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(sentence(error, kind, where)) from None


def sentence(error: ValidationError, kind: type[BaseModel], where: str = "") -> str:
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
        return f"{path} should be a section of keys; it is {shown(first['input'])}"
    says = first["msg"].removeprefix("Input ").replace("a valid tuple", "a list")
    return f"{path} {says[0].lower()}{says[1:]}; it is {shown(first['input'])}"


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
            inside = model_in(field.annotation) or inside
    return path, inside


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    kinds = (annotation, *get_args(annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def plugin_names(package: ModuleType) -> list[str]:
    """Names of the plug-ins a package ships: its files."""
    return sorted(
        info.name
        for info in pkgutil.iter_modules(package.__path__)
        if not info.name.startswith("_")
    )


def plugin_name(package: ModuleType, plugin: BaseModel) -> str:
    """The name under which a recipe finds a method or judge of `package`, or of the user's own module."""
    return type(plugin).__module__.removeprefix(f"{package.__name__}.")


def find_plugin(package: ModuleType, name: str, base: type[M], what: str) -> type[M]:
    """The one subclass of `base` defined in file `name` of `package`, or in any importable `a.b`."""
    known = plugin_names(package)
    if name not in known and "." not in name:
        raise RecipeError(f"no {what} {name!r}; {nearest(name, known)}")
    try:
        module = importlib.import_module(name if "." in name else f"{package.__name__}.{name}")
    except (Exception, SystemExit) as error:  # whatever the module does while it is imported
        raise RecipeError(f"{what} {name!r} cannot be imported: {failure(error)}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise RecipeError(
            f"{module.__name__} must define exactly one {base.__name__}, it defines {len(found)}"
        )
    return found[0]


class Options(BaseModel):
    """Base of all that users set: frozen; an unknown key, NaN and infinity are errors; docstrings are descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


def read_recipe(path: Path, kind: type[M], overrides: Sequence[str], *, needs: str) -> M:
    """A file as a recipe of one kind, overridden; RecipeError names file and overrides. `needs`: a section."""
    if isinstance(overrides, str):
        raise RecipeError(f"overrides is the text {overrides!r}; write a list, [{overrides!r}]")
    values = {"name": path.stem, **read_yaml(path, needs=needs)}
    for override in overrides:
        values = overridden(values, override)
    source = str(path)
    if overrides:
        source += " with " + " ".join(f"--set {override}" for override in overrides)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source}: {sentence(error, kind)}") from None


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
            f"{what} should be a section with a name ({', '.join(plugin_names(package))}); "
            f"it is {shown(value)}"
        )
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise RecipeError(
            f"{what}.name {name!r} is neither one of {', '.join(plugin_names(package))} "
            "nor a module that can be imported, such as my_package.my_module"
        )
    options = {key: option for key, option in value.items() if key != "name"}
    return build(find_plugin(package, name, base, what), options, what)
