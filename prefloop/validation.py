"""Pydantic's errors as the one sentence that a user is owed: where, what is wrong, what was meant."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from prefloop.config import nearest
from prefloop.errors import RecipeError
from prefloop.yaml_text import shown

M = TypeVar("M", bound=BaseModel)


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
