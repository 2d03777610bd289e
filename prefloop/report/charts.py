"""The report's charts: matplotlib draws them as SVG, a style sheet colours them.

The SVG has no style attributes, which the page's security policy would refuse: colours are classes, so that
the page can be light or dark, and everything of one run has that run's class, so that it can be hidden. No
text of a recipe or a model goes into a chart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from prefloop.report.facts import RunFacts
from prefloop.report.meanings import round_meaning, step_meaning

# Placeholder colours, replaced by classes of the style sheet.
_INK_COLOUR, _GRID_COLOUR = "#010101", "#020202"
_RUN_COLOUR = "#03{:02x}03"
RUN_COLOURS = 8
_SIZE = (4.4, 2.5)  # inches, at 72 units each
# More points than this width can show would only make the page larger.
_MOST_POINTS = 300
_CLASSES = {
    _INK_COLOUR: "ink",
    _GRID_COLOUR: "grid",
    **{_RUN_COLOUR.format(n): f"run-{n}" for n in range(RUN_COLOURS)},
}
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GRID_COLOUR,
    "axes.labelcolor": _INK_COLOUR,
    "axes.linewidth": 1,
    "xtick.color": _GRID_COLOUR,
    "ytick.color": _GRID_COLOUR,
    "xtick.labelcolor": _INK_COLOUR,
    "ytick.labelcolor": _INK_COLOUR,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID_COLOUR,
    "grid.linewidth": 0.6,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5),
    "axes.formatter.use_mathtext": False,
}


@dataclass
class Line:
    """One line of a chart. N points."""

    run: int
    x: list[float]
    y: list[float]
    dash: str = "-"
    label: str = ""
    """Distinguishes lines of the same run, such as "chosen"."""
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    """[N] an interval around each point, where there is one."""


@dataclass(frozen=True)
class Chart:
    """A chart with its title, note and the values that can be read off it."""

    title: str
    note: str
    svg: str
    lines: list[Line]
    box: tuple[float, float, float, float]
    """Left, top, right and bottom of the plotting area, in units of the SVG."""
    limits: tuple[float, float, float, float]
    """Data values at its left, bottom, right and top."""
    rounds: bool
    """Whether x counts rounds (-1: the start); otherwise it counts optimiser steps, or is a histogram's axis."""

    def readable(self) -> dict[str, Any] | None:
        """The numbers with which the page shows values under the pointer; None where there are no lines."""
        if not self.lines:
            return None
        return {
            "box": self.box,
            "limits": self.limits,
            "rounds": self.rounds,
            "lines": [
                {
                    "run": line.run,
                    "label": line.label,
                    "x": line.x,
                    "y": [float(f"{value:.5g}") for value in line.y],
                }
                for line in self.lines
            ],
        }

    @property
    def labels(self) -> list[tuple[str, str]]:
        """Legend of lines within one run: dash pattern and label."""
        dash_by_label = {line.label: line.dash for line in self.lines if line.label}
        return [
            ({"-": "solid", "--": "dashed", ":": "dotted"}[dash], label)
            for label, dash in dash_by_label.items()
        ]


def round_charts(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Chart]:
    """Measures by round, one chart each; those that no run has are left out."""
    charts = []
    for name in names:
        lines = [line for n, run in enumerate(runs) if (line := _by_round(n, run, name)).x]
        if lines:
            charts.append(_lines(*round_meaning(name).heading, lines, rounds=True))
    speeds = [
        line
        for n, run in enumerate(runs)
        for what, dash in (("generated", "-"), ("trained", "--"))
        if (line := _speed(n, run, what, dash)).x
    ]
    if speeds:
        note = "Generated and trained on, by the stages' own times."
        charts.append(_lines("Tokens a second", note, speeds, rounds=True))
    return charts


def _by_round(number: int, run: RunFacts, name: str) -> Line:
    line = Line(number, [], [])
    for result in run.results:
        value = result.measures.get(name)
        if value is None or not np.isfinite(value):
            continue
        line.x.append(result.round)
        line.y.append(value)
        low, high = (result.measures.get(f"{name}_{end}") for end in ("low", "high"))
        line.low.append(value if low is None else low)
        line.high.append(value if high is None else high)
    if line.low == line.y == line.high:
        line.low, line.high = [], []
    return line


def _speed(number: int, run: RunFacts, what: str, dash: str) -> Line:
    speeds = [(facts.number, speed) for facts in run.rounds if (speed := facts.speed[what])]
    return Line(number, [n for n, _ in speeds], [speed for _, speed in speeds], dash, what)


def step_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """Training metrics by optimiser step, one chart each; all rewards are in one chart."""
    skip = {"step", "tokens", "round", "at"}
    names = list(dict.fromkeys(key for run in runs for key in run.steps))
    rewards = {"reward_chosen": "chosen", "reward_rejected": "rejected"}
    charts = []
    for name in [key for key in names if key not in skip and key not in rewards]:
        lines = [line for n, run in enumerate(runs) if (line := _by_step(n, run, name)).x]
        if lines:
            charts.append(_lines(*step_meaning(name).heading, lines, ends=_round_ends(runs)))
    reward_lines = [
        line
        for n, run in enumerate(runs)
        for (name, label), dash in zip(rewards.items(), ("-", ":"), strict=True)
        if (line := _by_step(n, run, name, dash, label)).x
    ]
    curves = [line for n, run in enumerate(runs) if (line := _curve(n, run)).x]
    if curves:
        charts.insert(0, _lines(*step_meaning("win_rate").heading, curves, ends=_round_ends(runs)))
    if reward_lines:
        reward_lines += [
            line
            for n, run in enumerate(runs)
            # For most methods it equals the chosen answer's reward, which is drawn already.
            if run.steps.get("real_reward") != run.steps.get("reward_chosen")
            if (line := _by_step(n, run, "real_reward", "--", "target")).x
        ]
        charts.insert(
            min(3, len(charts)),
            _lines(*step_meaning("rewards").heading, reward_lines, ends=_round_ends(runs)),
        )
    return charts


def _by_step(number: int, run: RunFacts, name: str, dash: str = "-", label: str = "") -> Line:
    values_N = np.asarray(run.steps.get(name, ()), dtype=np.float64)
    there_N = np.isfinite(values_N)
    at_N, values_N = np.asarray(run.steps["at"])[: len(there_N)][there_N], values_N[there_N]
    size = max(1, -(-len(values_N) // _MOST_POINTS))
    groups = [slice(first, first + size) for first in range(0, len(values_N), size)]
    x, y = ([float(np.mean(of_N[group])) for group in groups] for of_N in (at_N, values_N))
    return Line(number, x, y, dash, label)


def _curve(number: int, run: RunFacts) -> Line:
    rows = [row for row in run.curve if row.get("win_rate") is not None]
    line = Line(number, [row["step"] for row in rows], [row["win_rate"] for row in rows])
    line.low, line.high = ([row[end] for row in rows] for end in ("low", "high"))
    return line


def _round_ends(runs: Sequence[RunFacts]) -> list[tuple[int, float]]:
    """(run, step) of each boundary between two rounds."""
    ends = []
    for n, run in enumerate(runs):
        rounds, at = run.steps["round"], run.steps["at"]
        ends += [(n, at[i] - 0.5) for i in range(1, len(at)) if rounds[i] != rounds[i - 1]]
    return ends


def distribution_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """Margin M and the judge's score gap over the pairs: the first round dotted, the last one solid."""
    note = "Pairs of the first round (dotted) and of the last one (solid)."
    charts = []
    for title, what in (("Margin M of the pairs", "margins"), ("Score gap of the pairs", "gaps")):
        values_by_run = [(n, [getattr(r, what) for r in run.rounds]) for n, run in enumerate(runs)]
        values_by_run = [(n, [v for v in rounds if v]) for n, rounds in values_by_run]
        all_values = np.concatenate(
            [[], *(values for _, rounds in values_by_run for values in rounds)]
        )
        if all_values.any():
            text = note if what == "margins" else f"Judge's score of chosen minus rejected. {note}"
            charts.append(_histogram(title, text, values_by_run, all_values))
    return charts


def _histogram(
    title: str,
    note: str,
    values_by_run: list[tuple[int, list[Sequence[float]]]],
    all_values: NDArray[np.float64],
) -> Chart:
    edges = np.histogram_bin_edges(all_values, bins=24)

    def draw(axes: Axes) -> None:
        for number, rounds in values_by_run:
            for values, dash in zip(rounds[-1:] + rounds[:1], ("-", ":"), strict=False):
                if dash == ":" and len(rounds) < 2:
                    continue
                counts, _ = np.histogram(values, edges)
                axes.stairs(
                    counts / counts.sum(),
                    edges,
                    color=_RUN_COLOUR.format(number % RUN_COLOURS),
                    linestyle=dash,
                    linewidth=1.6,
                    gid=f"r{number}-{dash}",
                )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:.0f} %"))

    return _draw(title, note, draw, [], rounds=False)


def _lines(
    title: str,
    note: str,
    lines: list[Line],
    *,
    rounds: bool = False,
    ends: Sequence[tuple[int, float]] = (),
) -> Chart:
    def draw(axes: Axes) -> None:
        for index, line in enumerate(lines):
            colour, group = _RUN_COLOUR.format(line.run % RUN_COLOURS), f"r{line.run}-{index}"
            if line.low:
                errors = [
                    [y - low for y, low in zip(line.y, line.low, strict=True)],
                    [high - y for y, high in zip(line.y, line.high, strict=True)],
                ]
                # Side by side, so that the intervals of several runs can be told apart.
                shifted = [x + 0.06 * line.run for x in line.x]
                bars = axes.errorbar(
                    shifted, line.y, np.clip(errors, 0, None), fmt="none", ecolor=colour, capsize=3
                )
                for part in (*bars[1], *bars[2]):
                    part.set_gid(f"{group}-bars")
            axes.plot(
                line.x,
                line.y,
                line.dash,
                color=colour,
                linewidth=1.8,
                marker="o" if rounds or len(line.x) == 1 else None,
                markersize=4,
                gid=group,
            )
        drawn = {line.run for line in lines}
        for index, (run, step) in enumerate(end for end in ends if end[0] in drawn):
            axes.axvline(
                step,
                color=_GRID_COLOUR,
                linewidth=1,
                linestyle=(0, (4, 3)),
                gid=f"r{run}-end{index}",
            )
        # Whole numbers on the x axis.
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if rounds:
            axes.xaxis.set_major_formatter(
                FuncFormatter(lambda x, _: "start" if x == -1 else f"{x:.0f}" if x >= 0 else "")
            )
        axes.margins(x=0.04, y=0.12)
        if not any(value for line in lines for value in line.y):
            # A line of zeros would otherwise get an axis that magnifies rounding errors.
            axes.set_ylim(-0.04, 1)

    return _draw(title, note, draw, lines, rounds=rounds)


def _draw(
    title: str, note: str, draw: Callable[[Axes], None], lines: list[Line], *, rounds: bool
) -> Chart:
    settings: Any = {**_SETTINGS, "svg.hashsalt": title}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_SIZE)
        # Equal margins, so that charts below each other line up.
        figure.subplots_adjust(left=0.15, right=0.985, bottom=0.12, top=0.92)
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        height = figure.get_figheight() * 72
        area, width = axes.get_position(), figure.get_figwidth() * 72
        box = (area.x0 * width, (1 - area.y1) * height, area.x1 * width, (1 - area.y0) * height)
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    svg = _restyle(file.getvalue(), title)
    numbers = [round(float(value), 2) for value in box]
    return Chart(
        title,
        note,
        svg,
        lines,
        (numbers[0], numbers[1], numbers[2], numbers[3]),
        (float(x0), float(y0), float(x1), float(y1)),
        rounds,
    )


def _restyle(text: str, title: str) -> str:
    """Matplotlib's SVG as an element of the page: styles become attributes and classes."""
    root = ElementTree.fromstring(text)
    namespace = "{http://www.w3.org/2000/svg}"
    for part in [
        child for child in root if child.tag != f"{namespace}g" and child.tag != f"{namespace}defs"
    ]:
        root.remove(part)
    for definitions in root.findall(f"{namespace}defs"):
        for style in definitions.findall(f"{namespace}style"):
            definitions.remove(style)
    for element in root.iter():
        element.tag = element.tag.removeprefix(namespace)
        _unstyle(element)
        if match := re.match(r"r(\d+)-", element.get("id", "")):
            _add_class(element, f"of-run of-{match[1]}")
            del element.attrib["id"]
        elif not element.get("id", "").startswith(("m", "p")) or element.tag == "g":
            # Markers and clip paths are referred to by id; all other ids are useless here.
            element.attrib.pop("id", None)
        if link := element.attrib.pop("{http://www.w3.org/1999/xlink}href", None):
            element.set("href", link)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _unstyle(element: ElementTree.Element) -> None:
    declarations = [part.split(":", 1) for part in element.attrib.pop("style", "").split(";")]
    pairs = [(part[0].strip(), part[1].strip()) for part in declarations if len(part) == 2]
    for name, value in [*pairs, *((n, element.get(n, "")) for n in ("fill", "stroke"))]:
        if value in _CLASSES:
            element.attrib.pop(name, None)
            _add_class(element, f"{name}-{_CLASSES[value]}")
        elif name == "font":
            element.set("font-size", re.findall(r"([\d.]+)px", value)[0])
            _add_class(element, "fill-ink")
        elif value and name != "font-family":
            element.set(name, value)


def _add_class(element: ElementTree.Element, name: str) -> None:
    element.set("class", f"{element.get('class', '')} {name}".strip())
