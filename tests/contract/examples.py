"""How a plug-in is put to work here: what it says itself, or a function in its own test file."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def example_in_tests(home: str, name: str, folder: Path) -> AbstractContextManager[Any]:
    """What `example(folder)` of tests.HOME.test_NAME gives: options, or a context that yields them. None without one.

    It makes what the plug-in reads or asks, tiny weights or a server, in `folder`.
    """
    module = f"tests.{home}.test_{name}"
    if find_spec(module) is None or not hasattr(import_module(module), "example"):
        return nullcontext()
    made = import_module(module).example(folder)
    return made if isinstance(made, AbstractContextManager) else nullcontext(made)
