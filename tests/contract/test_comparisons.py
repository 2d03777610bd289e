"""What every shipped comparison owes its users, and the one that the documentation shows."""

import re
from pathlib import Path

import pytest

from prefloop.compare.file import cells, load_comparison
from prefloop.config import SHIPPED
from prefloop.recipe.check import check_recipe

ROOT = Path(__file__).parents[2]
FILES = sorted((SHIPPED / "compare").glob("*.yaml"))


def test_there_are_comparisons() -> None:
    assert {"claims-arop", "claims-gamma"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_would_stop_it(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    comparison = load_comparison(path)
    assert len(comparison.seeds) >= 3
    found, _ = cells(comparison, Path("x"))
    for cell in found:
        check_recipe(cell.recipe)


def test_the_documented_one_loads(tmp_path: Path) -> None:
    page = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```yaml\n(# mine.yaml\n.*?)```", page, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    found, notes = cells(load_comparison(tmp_path / "mine.yaml"), Path("runs/mine"))
    assert len(found) == 9
    assert notes == ["variant arop: arop has no advice: left out of the base's method"]
