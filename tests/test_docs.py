"""The documentation: what it names exists, what it tells people to type works."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import prefloop.judges
import prefloop.methods
from prefloop import cli
from prefloop.compare.file import cells, load_comparison
from prefloop.config import find_plugin, plugin_names
from prefloop.methods import Method
from prefloop.recipe import load_recipe, shipped_recipes
from prefloop.recipe.reward import load_reward_recipe
from prefloop.report.console import MEASURES
from tests.contract.test_methods import loss_of

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text("utf-8")) if kind == language]


def commands(page: Path) -> Iterator[str]:
    """Every `prefloop ...` that stands in a block or between backquotes; explanations are cut off."""
    text = page.read_text("utf-8")
    inline = re.findall(r"`(prefloop [^`\n]+)`", FENCE.sub("", text))
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    found = [*inline, *(line for line in lines if line.startswith("prefloop "))]
    for command in found:
        yield " ".join(re.split(r"\s{3,}(?![\s-])", command)[0].split())


def cell_commands(notebook: Path) -> Iterator[str]:
    """Every `!prefloop ...` of a notebook."""
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        for line in "".join(cell["source"]).splitlines():
            if line.startswith("!prefloop "):
                yield line.removeprefix("!")


NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
COMMANDS = sorted(
    {(command, page_name(page)) for page in PAGES for command in commands(page)}
    | {(command, page_name(book)) for book in NOTEBOOKS for command in cell_commands(book)}
)


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = FENCE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def tree() -> list[str]:
    """Folders in the README's list of them."""
    blocks_with_it = [block for block in blocks(ROOT / "README.md", "") if "prefloop/cli/" in block]
    (block,) = blocks_with_it
    return [line.split()[0] for line in block.splitlines()]


def test_the_commands_and_the_tree_are_found() -> None:
    spac = "prefloop run quickstart-ial --out runs/spac --set method.gamma=0"
    assert (spac, "docs/methods/ial.md") in COMMANDS
    assert ("prefloop run quickstart-ial", "examples/quickstart.ipynb") in COMMANDS
    assert {"prefloop/methods/", "docs/"} <= set(tree())


@pytest.mark.parametrize("path", tree())
def test_what_the_tree_shows_exists(path: str) -> None:
    assert list(ROOT.glob(path))


def test_every_room_is_in_the_readme() -> None:
    rooms = {f"prefloop/{path.parent.name}/" for path in (ROOT / "prefloop").glob("*/__init__.py")}
    assert rooms <= set(tree())


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_relative_link_resolves(page: Path) -> None:
    for text, target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} in {page_name(page)}"
        if anchor:
            assert anchor in headings(file), f"{target} in {page_name(page)}"
        if file.suffix == ".py" and re.fullmatch(r"`[\w.]+`", text) and ".py" not in text:
            name = text.strip("`").rpartition(".")[2]
            assert re.search(rf"\b(def|class) {name}\b", file.read_text("utf-8")), text


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_table_row_has_as_many_cells_as_its_head(page: Path) -> None:
    for table in re.findall(r"(?:^\|.*\|\n)+", page.read_text("utf-8"), re.MULTILINE):
        assert len({row.replace("\\|", "").count("|") for row in table.splitlines()}) == 1, table


@pytest.mark.parametrize(("command", "page"), COMMANDS)
def test_every_command_parses_and_its_recipe_loads(
    command: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(ROOT / page, "yaml"):
        if named := re.match(r"# (\S+\.yaml)", block):
            Path(named[1]).write_text(block)
    verb, *words = shlex.split(command)[1:]
    if verb.startswith("-"):
        return
    group = typer.main.get_command(cli.app)
    while isinstance(inner := group.commands[verb], type(group)):  # type: ignore[attr-defined]
        group, (verb, *words) = inner, words
    assert verb in group.commands  # type: ignore[attr-defined]
    if not words:  # a verb that is only mentioned
        return
    # Raises where an option does not exist, and only then: callbacks are not called.
    context = group.commands[verb].make_context(verb, words)  # type: ignore[attr-defined]
    recipe = context.params.get("recipe")
    if recipe is not None and recipe != "RECIPE":
        load = load_reward_recipe if verb == "train" else load_recipe
        load(recipe, context.params["overrides"] or ())
    comparison = context.params.get("comparison")
    if comparison is not None and comparison.name != "COMPARE.yaml":
        cells(load_comparison(comparison), tmp_path)


def test_make_bench_leaves_out_what_wants_an_argument() -> None:
    (out,) = re.findall(
        r"filter-out \$\(addprefix benchmarks/,([^)]*)\)", (ROOT / "Makefile").read_text()
    )
    wanting = re.compile(r"""add_argument\("[a-z]|required=True""")
    scripts = ROOT.glob("benchmarks/*.py")
    assert sorted(out.split()) == sorted(s.name for s in scripts if wanting.search(s.read_text()))


def test_the_recipe_reference_is_up_to_date() -> None:
    path = ROOT / "docs/generate_recipe_reference.py"
    spec = importlib.util.spec_from_file_location("generate_recipe_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs/recipe.md").read_text("utf-8")
    assert module.reference() == page, f"run python {path.relative_to(ROOT)}"


def test_the_recipe_reference_explains_every_option() -> None:
    rows = re.findall(r"^\| `.*$", (ROOT / "docs/recipe.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 50
    assert not [row for row in rows if re.search(r"\|\s*\|$", row)]


@pytest.mark.parametrize("name", plugin_names(prefloop.methods))
def test_every_method_has_a_page_and_its_training_measures_are_explained(name: str) -> None:
    assert (ROOT / f"docs/methods/{name}.md").is_file()
    kind: type[Method] = find_plugin(prefloop.methods, name, Method, "method")
    output, _ = loss_of(kind(), 0.0)
    explained = (ROOT / "docs/metrics.md").read_text("utf-8")
    assert output.metrics
    assert [key for key in output.metrics if f"`train_{key}`" not in explained] == []


@pytest.mark.parametrize("name", plugin_names(prefloop.methods))
def test_every_method_is_linked_where_people_look_for_it(name: str) -> None:
    assert f"(methods/{name}.md)" in (ROOT / "docs/index.md").read_text("utf-8")
    assert f"(docs/methods/{name}.md)" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", plugin_names(prefloop.judges))
def test_every_judge_is_in_the_table_of_judges(name: str) -> None:
    assert f"\n| `{name}` |" in (ROOT / "docs/judges.md").read_text("utf-8")


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_of_the_table_is_explained(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs/metrics.md").read_text("utf-8")


def test_every_surprise_is_shown_by_a_test_or_a_finding() -> None:
    """That the linked file has the named test is looked up with all links."""
    rows = re.findall(
        r"^\| (?!library|---).*$", (ROOT / "docs/surprises.md").read_text("utf-8"), re.M
    )
    assert len(rows) > 30
    shown = [LINK.findall(row.rpartition(" | ")[2]) for row in rows]
    assert all(shown)
    for text, target in (link for links in shown for link in links):
        assert target.startswith("../findings/" if text == "finding" else "../tests/"), target
    findings = {target for links in shown for _, target in links if "/findings/" in target}
    assert findings == {f"../findings/{path.name}" for path in (ROOT / "findings").iterdir()}


def test_the_ecosystems_rows_are_counted() -> None:
    text = (ROOT / "docs/ecosystem.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\| ([a-z -]+) \|$", text, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 42))
    kinds = ("real", "stand-in", "not here", "missing")
    counts = Counter(kind for _, kind in rows)
    assert set(counts) <= set(kinds)
    assert ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind]) + "." in text


def test_decisions_are_numbered_without_gaps_and_say_what_would_change_them() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{n:04d}" for n in range(1, len(pages) + 1)]
    index = (ROOT / "docs/index.md").read_text("utf-8")
    for page in pages:
        text = page.read_text("utf-8")
        assert text.startswith(f"# {page.name[:4]} ")
        assert all(f"**{part}.**" in text for part in ("Context", "Decision"))
        assert "**What would change our mind.**" in text
        assert f"decisions/{page.name}" in index


def test_shipped_recipes_begin_with_a_line_on_themselves() -> None:
    for path in shipped_recipes().values():
        assert path.read_text("utf-8").startswith("# ")
