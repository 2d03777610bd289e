"""Plug-ins are found by file name, in the package or in a module of the user's."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefloop.methods
from prefloop.config import find_plugin, plugin_name, plugin_names
from prefloop.errors import RecipeError
from prefloop.methods import Method
from prefloop.methods.ial import IAL

OWN = """
from prefloop.methods import Method
from prefloop.methods.ial import IAL

class Mine(Method):
    '''Mine.'''
"""


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python imports from; what was imported is forgotten again."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def find(name: str) -> type[Method]:
    return find_plugin(prefloop.methods, name, Method, "method")


def package(folder: Path, **files: str) -> None:
    home = folder / "my_methods"
    home.mkdir()
    for name, text in {"__init__": "", **files}.items():
        (home / f"{name}.py").write_text(text)


def test_the_names_are_the_files_of_the_package(importable: Path) -> None:
    package(importable, zeta="", alpha="")
    import my_methods

    assert plugin_names(my_methods) == ["alpha", "zeta"]
    assert {"arop", "ial"} <= set(plugin_names(prefloop.methods))


def test_a_method_is_found_by_its_files_name() -> None:
    assert find("ial") is IAL


def test_a_users_module_is_found_by_its_dotted_name(importable: Path) -> None:
    """What a module only imports is not its own: Method and IAL do not count."""
    package(importable, mine=OWN)
    assert find("my_methods.mine").__name__ == "Mine"


def test_a_plug_in_knows_the_name_it_is_found_by(importable: Path) -> None:
    package(importable, mine=OWN)
    for name in ("ial", "my_methods.mine"):
        assert plugin_name(prefloop.methods, find(name)()) == name


@pytest.mark.parametrize(
    ("name", "hint"), [("iall", "did you mean 'ial'"), ("qqqq", "there are: arop, ")]
)
def test_an_unknown_name_gets_the_nearest_spelling_or_all(name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=f"no method '{name}'; {hint}"):
        find(name)


def test_a_module_that_is_not_there_or_fails_to_import_is_named(importable: Path) -> None:
    package(importable, broken="import no_such_thing_anywhere")
    with pytest.raises(RecipeError, match=r"'my_methods\.gone' cannot be imported"):
        find("my_methods.gone")
    with pytest.raises(RecipeError, match="no_such_thing_anywhere"):
        find("my_methods.broken")


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), (OWN + "class Second(Method):\n    pass\n", 2)]
)
def test_a_file_defines_exactly_one_plug_in(importable: Path, text: str, count: int) -> None:
    package(importable, mine=text)
    with pytest.raises(RecipeError, match=f"exactly one Method, it defines {count}"):
        find("my_methods.mine")
