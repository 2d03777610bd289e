"""Methods and judges are found by file name; this is the finding, with the nearest spelling on a miss."""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from types import ModuleType
from typing import TypeVar

from pydantic import BaseModel

from prefloop.errors import RecipeError

M = TypeVar("M", bound=BaseModel)


def nearest(word: str, known: list[str]) -> str:
    """The hint that ends an error about an unknown name: the nearest spelling, else all there are."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"


def names(package: ModuleType) -> list[str]:
    """Names of the plug-ins a package ships: its files."""
    return sorted(
        info.name
        for info in pkgutil.iter_modules(package.__path__)
        if not info.name.startswith("_")
    )


def name_of(package: ModuleType, plugin: BaseModel) -> str:
    """The name under which a recipe finds a method or judge of `package`, or of the user's own module."""
    return type(plugin).__module__.removeprefix(f"{package.__name__}.")


def find(package: ModuleType, name: str, base: type[M], what: str) -> type[M]:
    """The one subclass of `base` defined in file `name` of `package`, or in any importable `a.b`."""
    known = names(package)
    if name not in known and "." not in name:
        raise RecipeError(f"no {what} {name!r}; {nearest(name, known)}")
    try:
        module = importlib.import_module(name if "." in name else f"{package.__name__}.{name}")
    except (ImportError, SyntaxError) as error:
        raise RecipeError(f"{what} {name!r} cannot be imported: {error}") from error
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
