"""The rooms of the house: which part may import which, and how long a file or function may be.

Read from the syntax trees, so that an import inside a function counts. What stands under
`if TYPE_CHECKING:` is not there at run time and does not.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "prefloop"
FILES = sorted(PACKAGE.rglob("*.py"))
STAGES = {"generate", "rank", "train", "evaluate", "report"}
ABOVE_STAGES = {"methods", "loop", "session", "cli"}
PURE = {"train.losses", "train.ppo"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def place(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that the code imports at run time; `from a import b` counts as a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def rooms(path: Path) -> set[str]:
    """The parts of this package that a file imports, as "train" or "train.losses"."""
    names = imports(ast.parse(path.read_text(encoding="utf-8")))
    own = [name.split(".")[1:3] for name in names if name.split(".")[0] == "prefloop"]
    return {".".join(parts) for parts in own}


def test_the_reader_of_imports_sees_what_counts_and_only_that() -> None:
    code = """
import prefloop.loop
from prefloop import chat
if TYPE_CHECKING:
    from prefloop.rank import Judge
def late():
    from prefloop.train import losses
    import torch.nn
"""
    found = list(imports(ast.parse(code)))
    assert found == ["prefloop.loop", "prefloop.chat", "prefloop.train.losses", "torch.nn"]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_imports_no_other_stage_and_nothing_above(stage: str) -> None:
    forbidden = (STAGES | ABOVE_STAGES) - {stage}
    files = sorted((PACKAGE / stage).rglob("*.py"))
    assert files
    found = {
        f"{place(path)} imports {room}"
        for path in files
        for room in rooms(path)
        if room.split(".")[0] in forbidden
    }
    assert found == set()


def test_methods_compose_generation_ranking_and_losses_and_nothing_else() -> None:
    forbidden = {"loop", "session", "cli", "evaluate", "report", "train"}
    found = {
        f"{place(path)} imports {room}"
        for path in sorted((PACKAGE / "methods").rglob("*.py"))
        for room in rooms(path)
        if room.split(".")[0] in forbidden and not PURE & {room, room.rpartition(".")[0]}
    }
    assert found == set()


def test_only_the_command_line_and_its_workers_call_the_loop() -> None:
    callers = [path.name for path in FILES if "loop" in {r.split(".")[0] for r in rooms(path)}]
    assert sorted(callers) == ["cli.py", "worker.py"]


@pytest.mark.parametrize("path", FILES, ids=place)
def test_a_file_is_short_and_so_are_its_functions(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert (node.end_lineno or first) - first + 1 < MAX_FUNCTION_LINES, node.name


def test_no_file_has_a_name_that_says_nothing() -> None:
    names = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [place(path) for path in FILES if path.stem in names] == []


@pytest.mark.parametrize("path", FILES, ids=place)
def test_a_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
