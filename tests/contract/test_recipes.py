"""What every shipped recipe owes its users. A new file in prefloop/recipes/ is tested here without a line added."""

from pathlib import Path

import pytest

from prefloop.config import SHIPPED
from prefloop.recipe import load_recipe
from prefloop.recipe.check import check_recipe

RECIPES = sorted(SHIPPED.glob("*.yaml"))

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_there_are_recipes() -> None:
    assert {"quickstart-arop", "quickstart-ial"} <= {path.stem for path in RECIPES}


@every_recipe
def test_its_first_line_says_what_it_is(path: Path) -> None:
    """`ls recipes` shows this line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert len(first.split()) > 4


@every_recipe
def test_it_loads_and_nothing_would_stop_its_run(path: Path) -> None:
    recipe = load_recipe(str(path))
    check_recipe(recipe)
    assert recipe.name == path.stem


@every_recipe
def test_it_is_found_by_its_name(path: Path) -> None:
    assert load_recipe(path.stem) == load_recipe(str(path))


@every_recipe
def test_its_dump_loads_as_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path))
    (tmp_path / "dumped.yaml").write_text(recipe.dump(), encoding="utf-8")
    again = load_recipe(str(tmp_path / "dumped.yaml"))
    assert again == recipe
    assert again.dump() == recipe.dump()
