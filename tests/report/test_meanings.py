"""Every short name of a measure has words, on the console and on the page."""

import re
from pathlib import Path

import pytest

from prefloop.errors import counted
from prefloop.report.console import MEASURES
from prefloop.report.meanings import legend, measure_names, round_meaning

PAGE = (Path(__file__).parents[2] / "docs/metrics.md").read_text("utf-8")


def documented() -> list[str]:
    """Measures of a run in docs/metrics.md, intervals left out."""
    of_a_run = PAGE.partition("## Of the answers")[2].partition("## Of an evaluation")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", of_a_run, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return [name for name in dict.fromkeys(names) if not name.endswith(("_low", "_high"))]


@pytest.mark.parametrize("name", [*documented(), *MEASURES])
def test_every_measure_of_a_run_has_words(name: str) -> None:
    assert round_meaning(name).words


def test_no_words_are_for_a_measure_that_the_documentation_does_not_know() -> None:
    names = [name for name in measure_names() if not name.endswith(("_low", "_high"))]
    assert sorted(names) == sorted(documented())


def test_a_legend_is_in_the_order_of_the_table_and_leaves_unknown_names_out() -> None:
    assert legend(["train_M", "mine", "R_i"]) == [
        "train_M: M, what the reward margin R must exceed, mean",
        "R_i: share of rewrites that the judge scores above their draft",
    ]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 pairs"), (1, "1 pair"), (2, "2 pairs"), (1200, "1,200 pairs")]
)
def test_one_is_singular(number: int, text: str) -> None:
    assert counted(number, "pair") == text
