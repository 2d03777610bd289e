"""Tables of an evaluation, on a console, as Markdown and as LaTeX."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from prefloop.report.evaluation import latex, markdown, show_evaluation


def estimate(value: float, low: float, high: float, count: int = 40) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "count": count}


def measure(seconds: float = 2.0, **estimates: Any) -> dict[str, Any]:
    return {"better": {"kl": "neither"}, "estimates": estimates, "seconds": seconds}


def report(**changes: Any) -> dict[str, Any]:
    curves = {"steps_to_90": 12}
    subjects = {
        "r@start": {
            "measures": {"win_rate": measure(win_rate=estimate(0.5, 0.5, 0.5))},
            "skipped": {"preferences": "it has no pairs"},
            "curves": None,
        },
        "a_b|c": {
            "measures": {
                "win_rate": measure(win_rate=estimate(0.625, 0.5, 0.75)),
                "divergence": measure(kl=estimate(123.456, 100.0, 150.0)),
            },
            "skipped": {},
            "curves": curves,
        },
    }
    comparison = {
        "measure": "win_rate",
        "metric": "win_rate",
        "subject": "a_b|c",
        "against": "r@start",
        "difference": estimate(0.125, -0.01, 0.25),
        "p": 0.06,
        "p_holm": 0.06,
        "significant": False,
    }
    return {
        "prefloop": "0.1.0",
        "prompts": "p.jsonl",
        "judge": "similarity",
        "seed": 0,
        "subjects": subjects,
        "comparisons": [comparison],
        **changes,
    }


def printed(values: dict[str, Any]) -> str:
    out = StringIO()
    show_evaluation(values, Console(file=out, width=40))
    return out.getvalue()


def test_the_console_shows_every_value_with_its_interval_and_cuts_none() -> None:
    text = printed(report())
    assert "0.500 (0.500 to 0.500)" in text
    assert "0.625 (0.500 to 0.750)" in text
    assert "123.5 (100.0 to 150.0)" in text
    assert "+0.125 (-0.010 to +0.250)" in text
    assert "n.s." in text
    assert "skipped preferences of r@start: it has no pairs" in text
    assert "steps to 90 % of its highest win rate in training: 12" in text


def test_a_metric_that_a_subject_lacks_is_a_dash() -> None:
    line = next(line for line in printed(report()).splitlines() if line.startswith("divergence"))
    assert line.split()[1:3] == ["kl", "-"]


def test_one_subject_has_no_differences() -> None:
    values = report(comparisons=[])
    del values["subjects"]["r@start"]
    assert "Holm" not in printed(values)
    assert "Holm" not in markdown(values)


def test_what_is_significant_is_not_marked() -> None:
    values = report()
    values["comparisons"][0] |= {"significant": True, "p_holm": 0.01}
    assert "n.s." not in printed(values).replace("marked n.s.", "")
    assert "n.s." not in latex(values)


def test_markdown_has_as_many_cells_in_each_row_and_escapes_bars() -> None:
    text = markdown(report())
    assert "a_b\\|c" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        bars = {line.replace("\\|", "").count("|") for line in table.splitlines()}
        assert len(bars) == 1


def test_latex_rows_are_escaped_and_as_wide_as_their_head() -> None:
    lines = latex(report()).splitlines()
    assert lines[0].startswith("% ")
    rows = [line for line in lines if not line.startswith("%")]
    assert {line.count("&") for line in rows} == {2}
    assert all(line.endswith((r"\\", r"\midrule")) for line in rows)
    assert r"a\_b|c" in rows[0]
    assert r"win\_rate" in rows[1]
    assert r"0.625$^{\mathrm{n.s.}}$ {\footnotesize [0.500, 0.750]}" in rows[1]
