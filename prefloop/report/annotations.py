"""Console tables of an annotation's results. Reads the mapping that `annotate --json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from prefloop.errors import counted
from prefloop.report.formats import show_table

_HEAD = ("", "votes", "A", "tie", "B", "skipped", "A wins", "95 %", "first wins", "median s")
# With fewer prompts a bootstrap interval is too narrow: three votes for A would give [1, 1].
_MIN_PROMPTS = 10


def show_annotations(results: Mapping[str, Any], console: Console) -> None:
    """Print A's win rate by annotator and over all, the agreement, and warnings about the votes."""
    lines = [
        f"A  {results['a']}",
        f"B  {results['b']}",
        f"{results['judged']} of {counted(results['prompts'], 'prompt')} judged"
        + f"; {counted(results['identical'], 'more has identical answers', 'more have identical answers')}"
        * bool(results["identical"]),
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)
    console.print()
    rows = [_row(name, figures) for name, figures in results["annotators"].items()]
    if len(rows) != 1:
        rows.append(_row("together", results["everybody"]))
    show_table(_HEAD, rows, console)
    console.print(Text("\n" + "\n".join(_sentences(results))), soft_wrap=True)


def _row(name: str, figures: Mapping[str, Any]) -> list[str]:
    rate, first, seconds = (figures[key] for key in ("win_rate", "first_wins", "median_seconds"))
    return [
        name,
        *(str(figures[key]) for key in ("votes", "a", "tie", "b", "skipped")),
        "-" if rate is None else f"{rate['value']:.3f}",
        "" if rate is None else _interval(rate),
        "-" if first is None else f"{first['value']:.3f}",
        "-" if seconds is None else f"{seconds:.1f}",
    ]


def _sentences(results: Mapping[str, Any]) -> list[str]:
    all_votes, agreement = results["everybody"], results["agreement"]
    rate, first = all_votes["win_rate"], all_votes["first_wins"]
    lines = []
    if rate is None:
        lines.append("A's win rate: no votes yet")
    else:
        lines.append(
            f"A's win rate over {counted(rate['count'], 'prompt')}, ties one half: {rate['value']:.3f}, "
            f"95 % interval {_interval(rate)}{_verdict(rate)}"
        )
    if (with_identical := results["with_identical"]) is not None:
        lines.append(
            f"with identical answers as ties, over {counted(with_identical['count'], 'prompt')}: {with_identical['value']:.3f}, "
            f"95 % interval {_interval(with_identical)}"
        )
    if agreement is None:
        lines.append("agreement: no prompt has votes of two people")
    else:
        lines.append(_agreement(agreement))
    if first is not None and not first["low"] <= 0.5 <= first["high"]:
        lines.append(
            f"position: the answer shown first won {first['value']:.3f} of the votes ({_interval(first)}), which chance "
            "hardly gives; the order was drawn by lot, so this adds noise and does not favour A or B"
        )
    lines += [f"skipped {count}: {reason}" for reason, count in all_votes["reasons"].items()]
    if results["torn_bytes"]:
        lines.append(
            f"the last line of the votes was torn ({counted(results['torn_bytes'], 'byte')}); that vote does not count"
        )
    return lines


def _agreement(agreement: Mapping[str, Any]) -> str:
    estimate = agreement["estimate"]
    value_text = (
        "not defined, since all votes are the same"
        if estimate is None
        else f"{estimate['value']:.3f}, 95 % interval {_interval(estimate)}"
    )
    return (
        f"agreement of {counted(agreement['people'], 'person', 'people')} on {counted(agreement['items'], 'prompt')}: {agreement['measure']} "
        f"{value_text}; the same vote in {agreement['same']:.3f} of the cases"
    )


def _verdict(rate: Mapping[str, Any]) -> str:
    if rate["count"] < _MIN_PROMPTS:
        return "; too few prompts to trust that interval"
    if rate["low"] > 0.5:
        return ": A is better"
    return ": B is better" if rate["high"] < 0.5 else ": no difference can be told"


def _interval(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"
