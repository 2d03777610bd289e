"""Tables of `prefloop evaluate`: for the console, Markdown, and rows for LaTeX.

Reads the mapping that `prefloop evaluate --json` prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from prefloop.manifest import write_atomically
from prefloop.report.formats import latex_text, markdown_table, show_table

Report = Mapping[str, Any]
_ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}
NOT_SIGNIFICANT = "n.s."
CAVEAT = (
    "Intervals are 95 %, each on its own. A difference is marked n.s. where its p value (sign-flip test over "
    "items), adjusted for all differences of this table (Holm), is not below 0.05. Intervals cover the choice of "
    "items, not the randomness of training."
)


def show_evaluation(report: Report, console: Console) -> None:
    """Print measures by subject, then differences from the first subject, then what was skipped and why."""
    console.print(Text(_subtitle(report)), soft_wrap=True)
    console.print()
    head, rows = measure_table(report)
    show_table(head, rows, console)
    if report["comparisons"]:
        console.print()
        show_table(*difference_table(report), console)
        console.print()
        console.print(Text(CAVEAT), soft_wrap=True)
    lines = [*_steps(report), *_skipped(report)]
    if lines:
        console.print()
        console.print(Text("\n".join(lines)), soft_wrap=True)


def write_tables(report: Report, folder: Path) -> None:
    """Write evaluation.md and evaluation.tex."""
    write_atomically(folder / "evaluation.md", markdown(report))
    write_atomically(folder / "evaluation.tex", latex(report))


def measure_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per metric with each subject's value and interval, items, and total seconds."""
    subjects = report["subjects"]
    head = ["measure", "metric", *subjects, "items", "seconds"]
    rows = []
    for measure, metric in _metrics(report):
        estimates = [_estimate(subjects[name], measure, metric) for name in subjects]
        counts = [estimate["count"] for estimate in estimates if estimate]
        better = next(
            part["measures"][measure]["better"].get(metric, "higher")
            for part in subjects.values()
            if measure in part["measures"]
        )
        measured = [
            part["measures"][measure] for part in subjects.values() if measure in part["measures"]
        ]
        rows.append(
            [
                measure,
                f"{metric} {_ARROWS[better]}".rstrip(),
                *map(with_interval, estimates),
                " / ".join(map(str, sorted(set(counts)))),
                f"{sum(row['seconds'] for row in measured):.1f}",
            ]
        )
    return head, _first_row_only(rows)


def difference_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each subject minus the first, on the items that both have."""
    first = next(iter(report["subjects"]))
    head = ["difference", "metric", f"minus {first}", "items", "p (Holm)", ""]
    rows = [
        [
            row["subject"],
            row["metric"],
            with_interval(row["difference"], signed=True),
            str(row["difference"]["count"]),
            f"{row['p_holm']:.3f}",
            "" if row["significant"] else NOT_SIGNIFICANT,
        ]
        for row in report["comparisons"]
    ]
    return head, rows


def markdown(report: Report) -> str:
    """The tables as GitHub Markdown."""
    blocks = ["# Evaluation", _subtitle(report), markdown_table(*measure_table(report), texts=2)]
    if report["comparisons"]:
        blocks += [markdown_table(*difference_table(report), texts=2), CAVEAT]
    blocks += [f"- {line}" for line in (*_steps(report), *_skipped(report))]
    return "\n\n".join(blocks) + "\n"


def latex(report: Report) -> str:
    """Rows of a booktabs table: one row per metric, one column per subject, values with small intervals."""
    subjects = report["subjects"]
    lines = [
        f"% prefloop {report['prefloop']}; {_subtitle(report)}",
        f"% \\begin{{tabular}}{{l{'r' * len(subjects)}}}",
        " & ".join(["", *map(latex_text, subjects)]) + r" \\ \midrule",
    ]
    for measure, metric in _metrics(report):
        cells = []
        for name in subjects:
            estimate = _estimate(subjects[name], measure, metric)
            mark = "" if _significant(report, name, measure, metric) else r"$^{\mathrm{n.s.}}$"
            cells.append(
                "--"
                if estimate is None
                else f"{_number(estimate['value'], estimate)}{mark} {{\\footnotesize "
                f"[{_number(estimate['low'], estimate)}, {_number(estimate['high'], estimate)}]}}"
            )
        lines.append(" & ".join([latex_text(metric), *cells]) + r" \\")
    return "\n".join(lines) + "\n"


def with_interval(estimate: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """ "0.612 (0.551 to 0.668)", or "-" where there is no value."""
    if estimate is None:
        return "-"
    value, low, high = (
        _number(estimate[key], estimate, signed=signed) for key in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"


def _number(value: float, estimate: Mapping[str, Any], *, signed: bool = False) -> str:
    """The value with 1 to 3 decimals, by the estimate's size."""
    size = max(abs(estimate["low"]), abs(estimate["high"]))
    digits = 1 if size >= 100 else 2 if size >= 10 else 3
    return format(value, f"{'+' if signed else ''}.{digits}f")


def _metrics(report: Report) -> Iterator[tuple[str, str]]:
    """Measure and metric of every row, in the order of measuring."""
    metrics: dict[tuple[str, str], None] = {}
    for part in report["subjects"].values():
        for measure, row in part["measures"].items():
            metrics |= dict.fromkeys((measure, metric) for metric in row["estimates"])
    order = list(dict.fromkeys(measure for measure, _ in metrics))
    return iter(sorted(metrics, key=lambda pair: order.index(pair[0])))


def _estimate(part: Report, measure: str, metric: str) -> Mapping[str, Any] | None:
    row = part["measures"].get(measure)
    return row["estimates"].get(metric) if row else None


def _significant(report: Report, name: str, measure: str, metric: str) -> bool:
    """False only where the subject's difference in this metric was tested and is not significant."""
    return all(
        row["significant"]
        for row in report["comparisons"]
        if (row["subject"], row["measure"], row["metric"]) == (name, measure, metric)
    )


def _subtitle(report: Report) -> str:
    judge = report["judge"] or "none"
    return f"prompts: {report['prompts']}    judge: {judge}    seed: {report['seed']}"


def _steps(report: Report) -> list[str]:
    return [
        f"{name}: steps to 90 % of its highest win rate in training: {part['curves']['steps_to_90']}"
        for name, part in report["subjects"].items()
        if part["curves"] and part["curves"]["steps_to_90"] is not None
    ]


def _skipped(report: Report) -> list[str]:
    return [
        f"skipped {measure} of {name}: {reason}"
        for name, part in report["subjects"].items()
        for measure, reason in part["skipped"].items()
    ]


def _first_row_only(rows: Sequence[list[str]]) -> list[list[str]]:
    """The rows with a measure's name and seconds in its first row only."""
    seen: set[str] = set()
    shortened = []
    for row in rows:
        shortened.append(["", *row[1:-1], ""] if row[0] in seen else row)
        seen.add(row[0])
    return shortened
