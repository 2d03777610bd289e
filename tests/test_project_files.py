"""What stands beside the code: citation, templates of issues, container and notebook name only what is there."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import prefloop
from tests.run.test_loop import play, recipe

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
NOTEBOOK = json.loads((ROOT / "examples/quickstart.ipynb").read_text("utf-8"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def python_of(cell: dict[str, Any]) -> str:
    """A code cell without the lines that a shell or IPython takes."""
    return "\n".join(line for line in source(cell).splitlines() if line[:1] not in "!%")


CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_no_two_test_files_have_one_name() -> None:
    """pytest takes the second one for the first, where compiled files are kept."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_the_citation_has_the_formats_required_keys_and_the_packages_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] in ("software", "dataset")
    assert all({"name", "family-names"} & set(author) for author in cited["authors"])
    assert cited["version"] == prefloop.__version__
    assert cited["license"] == PROJECT["license"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_for_issues_is_whole_and_names_pages_that_exist(path: Path) -> None:
    form = yaml.safe_load(path.read_text("utf-8"))
    if path.name == "config.yml":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    parts = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in parts}) == len(parts) > 0
    assert all(part["attributes"]["label"] for part in parts)
    named = re.findall(r"\b(?:docs/)?[\w-]+\.md\b", path.read_text("utf-8"))
    assert [page for page in named if not (ROOT / page).is_file()] == []


@pytest.mark.parametrize("name", ["Dockerfile", ".github/pull_request_template.md"])
def test_make_is_asked_only_for_what_the_makefile_has(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    asked = re.findall(r'\bmake ([a-z-]+)|"make", "([a-z-]+)"', text)
    assert asked
    assert {one or other for one, other in asked} <= TARGETS


def test_the_container_knows_every_argument_it_uses() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    commands = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    given = set(re.findall(r"^(?:ARG|ENV) (\w+)", commands, re.MULTILINE)) | {"PATH"}
    assert set(re.findall(r"\$\{?(\w+)", commands)) <= given
    # Arguments before FROM end there.
    assert commands.index("ARG PYTHON") < commands.index("FROM ") < commands.index("ARG DEVICE")


def test_the_notebook_is_of_format_4_and_carries_no_output() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_the_notebook_installs_what_make_quickstart_installs() -> None:
    of_make = re.findall(r"--no-deps (.*)$", MAKEFILE, re.MULTILINE)
    of_notebook = [re.findall(r"--no-deps (.*)$", source(cell), re.MULTILINE) for cell in CODE]
    assert [*filter(None, of_notebook)] == [of_make] != [[]]
    extra = re.findall(r"'prefloop\[(\w+)\]'", source(CODE[0]))
    assert extra == ["embedded"]
    assert set(extra) <= set(PROJECT["optional-dependencies"])


def test_the_notebooks_python_runs_beside_a_finished_run(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(recipe(model_folder, "ial", loop={"rounds": 1}), tmp_path / "runs/quickstart-ial")
    (tmp_path / "runs/quickstart-ial/report.html").write_text("<p>quoted: \"'</p>", "utf-8")
    shown: list[str] = []
    display = ModuleType("IPython.display")
    display.HTML = shown.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in CODE:
        exec(compile(python_of(cell), cell["id"], "exec"), names)
    assert "&quot;" in shown[0]
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text("utf-8").splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "response"}] * 3
