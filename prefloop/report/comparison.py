"""Tables of `prefloop compare`, for the console, Markdown and LaTeX. Reads the mapping of comparison.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from prefloop.report.console import duration
from prefloop.report.formats import latex_text, markdown_table, printable, show_table

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_STAGES = ("generate", "rank", "pair", "train", "evaluate")


@dataclass(frozen=True)
class Table:
    """One table with its title and notes."""

    title: str
    head: tuple[str, ...]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Measures, ranking and cost; [] while no cell is finished."""
    if not report["variants"]:
        return []
    by_round = [_by_round(report)] if report.get("by_round") else []
    differences = [_differences(report)] if any(report["differences"].values()) else []
    return [_measures(report), *by_round, *differences, _ranking(report), _cost(report)]


def show_comparison(report: Mapping[str, Any], console: Console) -> None:
    """Print all tables, then the missing cells with their reasons."""
    if report["note"]:
        console.print(Text(printable(report["note"])), soft_wrap=True)
    for table in tables(report):
        console.print()
        console.print(Text(table.title, style="bold"), soft_wrap=True)
        show_table(table.head, table.rows, console)
        for note in table.notes:
            console.print(Text(printable(note)), soft_wrap=True)
    for name, reason in report["missing"].items():
        console.print(Text(printable(f"missing: {name}: {reason}")), soft_wrap=True)


def markdown(report: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    parts = [report["note"]] if report["note"] else []
    for table in tables(report):
        body = markdown_table(table.head, table.rows, texts=1)
        parts.append("\n\n".join([f"**{table.title}**", body, *table.notes]))
    parts += [f"Missing: {name}: {reason}" for name, reason in report["missing"].items()]
    return "\n\n".join(parts) + "\n"


def latex(report: Mapping[str, Any]) -> str:
    """All tables as LaTeX; needs \\usepackage{booktabs}."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables(report):
        rows = [" & ".join(map(latex_text, row)) + r" \\" for row in [table.head, *table.rows]]
        caption = " ".join([f"{table.title}.", *table.notes])
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{latex_text(caption)}}}",
                    rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
                    r"\toprule",
                    rows[0],
                    r"\midrule",
                    *rows[1:],
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _measures(report: Mapping[str, Any]) -> Table:
    rows = []
    for variant, result in report["variants"].items():
        cells = [variant, str(len(result["cells"]))]
        for name in report["measures"]:
            difference = report["differences"].get(name, {}).get(variant)
            star = " *" if difference and difference["real"] else ""
            cells.append(_estimate(result["measures"][name]) + star)
        rows.append(cells)
    notes = ["± : half of the 95 % t-interval of the mean over seeds"]
    if any(report["differences"].values()):
        notes += [
            f"* : differs from {report['control']} (5 %, {_how_paired(report)}, Holm over variants)"
        ]
    return Table(
        "Measures after the last round",
        ("variant", "seeds", *report["measures"]),
        rows,
        tuple(notes),
    )


def _differences(report: Mapping[str, Any]) -> Table:
    """Each variant against the control, for each measure."""
    rows = [
        [
            name,
            variant,
            _number(one["difference"]),
            f"{_number(one['low'])} to {_number(one['high'])}",
            f"{one['p_holm']:.3f}",
            _number(one["detectable"]),
        ]
        for name, variants in report["differences"].items()
        for variant, one in variants.items()
    ]
    head = ("measure", "variant", "difference", "95 %", "p (Holm)", "detectable")
    notes = (
        f"{_how_paired(report).capitalize()}; intervals are not corrected, p is, over the variants of a measure",
        "detectable : the true difference that so many seeds and prompts would show four times in five",
    )
    return Table(f"Differences from {report['control']}", head, rows, notes)


def _by_round(report: Mapping[str, Any]) -> Table:
    """A row for each variant and round: the mean, and each seed's value."""
    rows = []
    for variant, rounds in report["by_round"].items():
        for one in rounds:
            name = "start" if one["round"] < 0 else str(one["round"])
            rows.append([variant, name, *map(_mean_of_seeds, one["measures"].values())])
    names = next(iter(report["by_round"].values()))[0]["measures"]
    notes = (
        "Mean (each seed's); seconds are of the stages that a cell worked itself or took over",
    )
    return Table("Round by round", ("variant", "round", *names), rows, notes)


def _mean_of_seeds(measure: Mapping[str, Any]) -> str:
    values = [_number(value) for value in measure["by_seed"].values()]
    if measure["mean"] is None:
        return "-"
    mean = _number(measure["mean"]["value"])
    return mean if len(values) == 1 else f"{mean} ({', '.join(values)})"


def _how_paired(report: Mapping[str, Any]) -> str:
    pairs = report["ranking"]["pairs"]
    by_prompt = any(pair["prompts"] for pair in pairs)
    return (
        "paired by seed and prompt, seeds only where a measure has no value a prompt"
        if by_prompt
        else "paired by seed"
    )


def _ranking(report: Mapping[str, Any]) -> Table:
    ranking = report["ranking"]
    order, groups = ranking["order"], ranking["groups"]
    contrasts = {(pair["first"], pair["second"]): pair for pair in ranking["pairs"]}
    rows = []
    for entry in order:
        letters = "".join(
            _LETTERS[index % 26] for index, group in enumerate(groups) if entry["variant"] in group
        )
        contrast = contrasts.get((order[0]["variant"], entry["variant"]))
        rows.append(
            [
                entry["variant"],
                _number(entry["mean"]),
                letters,
                "-" if contrast is None else _number(contrast["difference"]),
                "-"
                if contrast is None
                else f"{_number(contrast['low'])} to {_number(contrast['high'])}",
                "-" if contrast is None else f"{contrast['p_holm']:.3f}",
            ]
        )
    head = ("variant", report["rank_by"], "group", "behind the first", "95 %", "p (Holm)")
    return Table(f"Ranking by {report['rank_by']}", head, rows, _verdict(report))


def _verdict(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences on how far the ranking is more than noise."""
    ranking = report["ranking"]
    groups, seeds = ranking["groups"], [len(v["cells"]) for v in report["variants"].values()]
    if len(ranking["order"]) < 2:
        return ()
    if not ranking["pairs"]:
        return ("One seed: the order may be luck, and nothing here can tell.",)
    notes = [f"{_how_paired(report)}; Holm over all pairs".capitalize()]
    if len(groups) == 1:
        return ("No difference is larger than noise: the order means nothing.", *notes)
    overlapping = [group for group in groups if len(group) > 1]
    lines = [f"Not distinguishable: {', '.join(group)}." for group in overlapping]
    if min(seeds) < 5:
        notes.append(f"{min(seeds)} seeds: only large differences can be told from noise")
    return (*lines, *notes)


def _cost(report: Mapping[str, Any]) -> Table:
    rows = []
    stages = [
        stage
        for stage in _STAGES
        if any(stage in result["cost"]["seconds"] for result in report["variants"].values())
    ]
    for variant, result in report["variants"].items():
        cost = result["cost"]
        cells = [variant, f"{cost['rounds']:g}", f"{cost['generated_tokens']:,.0f}"]
        cells += [f"{cost['trained_tokens']:,.0f}", _number(cost["flops"] / 1e12)]
        cells += [duration(cost["seconds"].get(stage, 0.0)) for stage in stages]
        cells.append(f"{cost['peak_memory_mb']:,.0f}")
        cells.append("-" if cost["budget_used"] is None else f"{100 * cost['budget_used']:.0f} %")
        rows.append(cells)
    head = (
        "variant",
        "rounds",
        "tokens generated",
        "trained",
        "TFLOP",
        *stages,
        "peak MiB",
        "budget",
    )
    budget = report["budget"]
    budget_note = (
        "Budget: " + ", ".join(f"{value:,g} {name}" for name, value in budget.items())
        if budget
        else "No common budget: each variant played all its rounds"
    )
    notes = (
        "Means over seeds, of memory the most; shared work counts for each that uses it",
        budget_note,
    )
    return Table("Cost", head, rows, notes)


def _estimate(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if low is None:
        return _number(value)
    return f"{_number(value)} ± {_number((high - low) / 2)}"


def _number(value: float) -> str:
    """About three significant digits, never in scientific notation."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
