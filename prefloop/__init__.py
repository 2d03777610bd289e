"""Closed-loop self-alignment of language models, without human preference labels.

The names in `__all__` are the library: `load_recipe`, `run`, `evaluate`, `Recipe`, `Run`, and the error that all of
them raise. They are loaded when they are first used. Everything else is internal and may change at any time.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefloop.api import Run, evaluate, run
    from prefloop.errors import PrefloopError
    from prefloop.recipe import Recipe, load_recipe

__all__ = ["PrefloopError", "Recipe", "Run", "__version__", "evaluate", "load_recipe", "run"]
__version__ = "0.1.0"

_HOMES = {
    "PrefloopError": "prefloop.errors",
    "Recipe": "prefloop.recipe",
    "Run": "prefloop.api",
    "load_recipe": "prefloop.recipe",
}
_VERBS = ("evaluate", "run")


def __getattr__(name: str) -> Any:
    """Load a public name on its first use."""
    if name in _VERBS:
        return import_module(f"prefloop.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'prefloop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)


class _Verb(ModuleType):
    """A room that is called like the function of its name: `prefloop.run(recipe)`, and `prefloop.run.loop` inside."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        api = import_module("prefloop.api")
        return getattr(api, self.__name__.removeprefix("prefloop."))(*args, **options)


class _Package(ModuleType):
    """Python puts each imported room on the package, over any function of that name; so two rooms become callable."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
