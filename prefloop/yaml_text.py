"""YAML as recipes are written in it: read without YAML 1.1's traps, overridden, and written to be read back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from yaml import MarkedYAMLError

from prefloop.errors import RecipeError


def parse_yaml(text: str, source: str) -> Any:
    """The value that YAML text stands for; RecipeError names `source`, line and column of a mistake."""
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value, default=str)  # ValueError where an alias stands inside its own anchor
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
