"""The JSON schema of a recipe file, for editors."""

from __future__ import annotations

from functools import reduce
from operator import or_
from types import ModuleType
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, create_model

import prefloop.generate.engines
import prefloop.judges
import prefloop.methods
from prefloop.config import find_plugin, plugin_names
from prefloop.generate.engine import EngineOptions
from prefloop.generate.engines.hf import InProcess
from prefloop.judges import Judge
from prefloop.methods import Method
from prefloop.recipe import Recipe

M = TypeVar("M", bound=BaseModel)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, with the options of every method and judge of this package."""
    methods = _alternatives(prefloop.methods, Method, "method")
    judges = _alternatives(prefloop.judges, Judge, "judge")
    engines = _alternatives(prefloop.generate.engines, EngineOptions, "engine")
    full = create_model(
        "Recipe",
        __base__=Recipe,
        method=(methods, ...),
        judge=(judges | None, None),
        eval_judge=(judges | None, None),
        engine=(engines, InProcess()),
    )
    schema = full.model_json_schema()
    schema["required"].remove("name")  # load_recipe takes the file's stem
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _alternatives(package: ModuleType, base: type[M], what: str) -> Any:
    sections = []
    for name in plugin_names(package):
        kind = find_plugin(package, name, base, what)
        fields: dict[str, Any] = {"name": (Literal[name], ...)}
        sections.append(create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **fields))
    return reduce(or_, sections)
