"""The pictures: their numbers are the run's, their points lie where the page reads them, nothing in them is styled."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from prefloop.report.charts import Chart, distribution_charts, round_charts, step_charts
from prefloop.report.facts import read_facts
from tests.report.conftest import make_run, write_metrics


@pytest.fixture(scope="module")
def charts(made_run: Path) -> dict[str, Chart]:
    runs = [read_facts(made_run), read_facts(made_run)]
    found = [*round_charts(runs, ["score", "win_rate", "absent"]), *step_charts(runs)]
    return {chart.title: chart for chart in [*found, *distribution_charts(runs)]}


def test_a_picture_for_each_measure_that_there_is(charts: dict[str, Chart]) -> None:
    assert list(charts) == [
        "Judge's score",
        "Win rate over the start",
        "Tokens a second",
        "Loss",
        "Learning rate",
        "Margin M",
        "Reward of each response",
        "Margin M of the pairs",
        "Score gap of the pairs",
    ]


def test_lines_are_the_runs_numbers_over_all_rounds(charts: dict[str, Chart]) -> None:
    score = charts["Judge's score"].lines
    assert [(line.run, line.x, line.y) for line in score] == [
        (0, [-1, 0, 1], [1.0, 2.0, 3.0]),
        (1, [-1, 0, 1], [1.0, 2.0, 3.0]),
    ]
    assert charts["Loss"].lines[0].x == [1, 2, 3, 4]
    assert charts["Loss"].lines[0].y == [1, 1 / 2, 1 / 2, 1 / 3]
    assert charts["Win rate over the start"].lines[0].low == [0.5, 0.3, 0.3]
    speeds = {line.label: line.y for line in charts["Tokens a second"].lines[:2]}
    # An answer of AROP is counted once though two names may share it: 4 prompts, equal ids within each.
    assert speeds == {"generated": [8.0, 8.0], "trained": [20.0, 20.0]}


def test_a_point_is_drawn_where_the_page_looks_for_it(charts: dict[str, Chart]) -> None:
    chart = charts["Loss"]
    left, top, right, bottom = chart.box
    x0, y0, x1, y1 = chart.limits
    line = chart.lines[0]
    wanted = [
        (
            left + (x - x0) / (x1 - x0) * (right - left),
            bottom - (y - y0) / (y1 - y0) * (bottom - top),
        )
        for x, y in zip(line.x, line.y, strict=True)
    ]
    (group,) = [g for g in ElementTree.fromstring(chart.svg).iter("g") if _is_line_of(g, 0)]
    path = group.find("path")
    assert path is not None
    numbers = [float(n) for n in re.findall(r"[-\d.]+", path.get("d", ""))]
    drawn = list(zip(numbers[::2], numbers[1::2], strict=True))
    assert drawn == [pytest.approx(point, abs=0.1) for point in wanted]


def _is_line_of(group: ElementTree.Element, run: int) -> bool:
    path = group.find("path")
    solid = path is not None and path.get("stroke-dasharray") is None
    return f"of-{run}" in group.get("class", "").split() and solid


def test_no_picture_has_styles_text_of_a_run_or_white_paper(charts: dict[str, Chart]) -> None:
    for chart in charts.values():
        root = ElementTree.fromstring(chart.svg)
        assert all(element.get("style") is None for element in root.iter()), chart.title
        assert "#ffffff" not in chart.svg
        assert "http" not in chart.svg
        assert "<style" not in chart.svg
        assert 'class="' in chart.svg
        used = set(re.findall(r'href="#([^"]+)"', chart.svg))
        assert used <= {element.get("id") for element in root.iter()}


def test_a_long_training_is_drawn_with_as_many_points_as_can_be_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long")
    lines = [f'{{"step": {n}, "loss": {n}.0}}\n' for n in range(5000)]
    write_metrics(run, "".join(lines).encode())
    (line,) = next(chart for chart in step_charts([read_facts(run)]) if chart.title == "Loss").lines
    assert 200 < len(line.x) <= 300
    assert line.x[0] == pytest.approx(line.y[0] + 1), "means of the same steps"


@pytest.mark.parametrize(("taught", "labels"), [(0.5, []), (2.0, ["target"])])
def test_the_targets_reward_is_drawn_where_it_is_not_the_chosen_ones(
    taught: float, labels: list[str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", rounds=1)
    row = {"reward_chosen": 0.5, "reward_rejected": 0.1, "real_reward": taught, "penalty": 0.0}
    write_metrics(run, json.dumps(row).encode() + b"\n")
    charts = {chart.title: chart for chart in step_charts([read_facts(run)])}
    found = [label for _, label in charts["Reward of each response"].labels]
    assert found == ["chosen", "rejected", *labels]


def test_a_metric_without_a_number_has_no_picture(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1)
    rows = '{"step": 0, "loss": 1.0, "odd": NaN, "other": null}\n'
    write_metrics(run, rows.encode())
    assert [chart.title for chart in step_charts([read_facts(run)])] == ["Loss"]


def test_the_win_rate_during_training_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rows = [
        {"step": 2, "win_rate": 0.5, "low": 0.3, "high": 0.7},
        {"step": 4, "win_rate": None, "low": None, "high": None},
    ]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (run / "rounds/0000/curve.jsonl").write_text(lines)
    first = step_charts([read_facts(run)])[0]
    assert first.title == "Win rate during training"
    assert (first.lines[0].x, first.lines[0].low) == ([2], [0.3])
