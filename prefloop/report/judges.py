"""Tables of judges against human choices, and of a reward model's calibration.

Reads the mappings of `judge check --json` and of a reward model's report.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from prefloop.errors import counted
from prefloop.report.formats import show_table

Measures = Mapping[str, Any]


def show_judges(report: Mapping[str, Mapping[str, Measures]], console: Console) -> None:
    """Print one table per data set with one row per judge. `report` maps judge -> data set -> measures."""
    for source in dict.fromkeys(name for rows in report.values() for name in rows):
        first = next(iter(report.values()))[source]
        ties = f", {first['human_ties']} of them ties to people" * bool(first["human_ties"])
        console.print(Text(f"{source}: {counted(first['pairs'], 'pair')}{ties}", style="bold"))
        rows = {name: by_source[source] for name, by_source in report.items()}
        show_table(_HEAD, [[name, *judge_cells(row)] for name, row in rows.items()], console)
        for name, row in rows.items():
            for reason, count in row["reasons"].items():
                console.print(Text(f"  {name}: {count} without a verdict: {reason}"))
        console.print()


_HEAD = (
    "judge",
    "agrees",
    "95 %",
    "over longer",
    "95 %",
    "longer better",
    "shorter better",
    "prefers longer",
    "length corr.",
    "ties",
    "failed",
    "first wins",
    "order changes",
)


def judge_cells(row: Measures) -> list[str]:
    """The table's cells after the judge's name, for one data set."""
    position = row.get("position") or {}
    return [
        *_with_interval(row["agreement"]),
        *_with_interval(row["over_longer"], signed=True),
        _value(row["where_longer_is_better"]),
        _value(row["where_shorter_is_better"]),
        _value(row["prefers_longer"]),
        _number(row["length_correlation"], signed=True),
        _value(row["ties"]),
        _value(row["failures"]),
        _number(position.get("first_wins")),
        _number(position.get("changed")),
    ]


def show_calibration(held_out: Mapping[str, Measures], console: Console) -> None:
    """Print calibration by data set, then the reliability curve over all of them."""
    head = ("calibration", "pairs", "log loss", "Brier", "ECE")
    curves = {name: row["calibration"] for name, row in held_out.items() if row["calibration"]}
    rows = [
        [
            name,
            str(sum(bin["pairs"] for bin in curve["bins"])),
            *(_number(curve[key]) for key in ("log_loss", "brier", "ece")),
        ]
        for name, curve in curves.items()
    ]
    show_table(head, rows, console)
    if not curves:
        return
    console.print()
    name, curve = list(curves.items())[-1]
    bins = [
        [
            f"{bin['low']:.2f} to {bin['high']:.2f}",
            str(bin["pairs"]),
            *(_number(bin[key]) for key in ("confidence", "accuracy")),
        ]
        for bin in curve["bins"]
    ]
    show_table((f"reliability ({name})", "pairs", "says", "is right"), bins, console)


def _with_interval(estimate: Measures | None, *, signed: bool = False) -> tuple[str, str]:
    if estimate is None:
        return "-", ""
    form = "+.3f" if signed else ".3f"
    return f"{estimate['value']:{form}}", f"{estimate['low']:{form}} to {estimate['high']:{form}}"


def _value(estimate: Measures | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.3f}"


def _number(value: float | None, *, signed: bool = False) -> str:
    return "-" if value is None else format(value, "+.3f" if signed else ".3f")
