"""The floors of the house: a room imports only rooms below it.

Read from the syntax trees: imports inside functions and under `if TYPE_CHECKING:` count like all others.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "prefloop"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up; rooms of one floor do not know each other.
FLOORS = (
    {"errors"},
    {"records", "machine"},
    {"config"},
    {"manifest"},
    {"run_folder"},
    {"data", "models"},
    {"train", "generate"},
    {"judges"},
    {"methods"},
    {"recipe"},
    {"evaluate"},
    {"report"},
    {"run"},
    {"annotate", "compare"},
    {"cli", "api"},
    {"__init__", "__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# One that is longer is looked at: is it one thing?
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names that the code imports, wherever it does; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    found = set()
    for name in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        if name in MODULES and MODULES[name] != path:
            found.add(name)
    return found


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


def room_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_the_reader_of_imports_sees_those_inside_functions_and_for_types() -> None:
    code = """
import prefloop.run.loop
if TYPE_CHECKING:
    from prefloop.judges import Judge
def late():
    from prefloop.train import losses
"""
    found = set(imported_names(ast.parse(code)))
    assert found == {"prefloop.run.loop", "prefloop.judges.Judge", "prefloop.train.losses"}


def test_every_room_has_a_floor_and_every_floor_its_rooms() -> None:
    assert {room_of(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    module = module_of(path)
    # `prefloop` itself holds the version, which every room may ask for.
    above = {
        other
        for other in IMPORTS[module] - {"prefloop"}
        if room_of(other) != room_of(module) and FLOOR[room_of(other)] >= FLOOR[room_of(module)]
    }
    assert above == set()


def test_the_picture_in_the_concepts_is_this_list() -> None:
    page = (PACKAGE.parent / "docs/concepts.md").read_text(encoding="utf-8")
    picture = page.partition("## The house")[2].split("```")[1].strip().splitlines()
    shown = [set(line[:26].split()) for line in picture]
    inside = [rooms - {"__init__", "__main__"} for rooms in FLOORS]
    assert shown[::-1] == [rooms for rooms in inside if rooms]


def test_no_imports_run_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(IMPORTS[module] - {"prefloop"}):
                visit(other, (*way, module))
            done.add(module)

    for module in sorted(IMPORTS):
        visit(module, ())


def test_only_the_command_line_the_worker_and_the_public_functions_call_the_loop() -> None:
    callers = {module for module, others in IMPORTS.items() if "prefloop.run.loop" in others}
    assert {room_of(module) for module in callers} - {"cli", "api"} == {"run"}
    assert {module for module in callers if room_of(module) == "run"} == {"prefloop.run.worker"}


def test_training_knows_no_generation_no_judge_and_no_method() -> None:
    others = {
        room_of(other)
        for module in MODULES
        if room_of(module) == "train"
        for other in IMPORTS[module]
    }
    assert others & {"generate", "judges", "methods"} == set()


def test_a_report_computes_nothing() -> None:
    """It opens no model, and asks the rooms that compute for nothing but their records and words."""
    names = {
        name.split(".")[0]
        for path in (PACKAGE / "report").rglob("*.py")
        for name in imported_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert names & {"torch", "transformers", "scipy"} == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_one_thing_and_its_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert (node.end_lineno or first) - first + 1 < MAX_FUNCTION_LINES, node.name


def test_no_file_has_a_name_that_says_nothing() -> None:
    names = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [name_of(path) for path in FILES if path.stem in names] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
