"""`prefloop report`: one HTML file that works from disk; it loads nothing and runs nothing that a model wrote.

A hash-based Content-Security-Policy allows this page's own style and script only. Chains are gzipped JSON and
reach the page through `textContent`. Where there are too many for one page, it holds a sample, and all of them
are in a file beside it that the page can open.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prefloop.errors import RunFolderError
from prefloop.manifest import write_atomically
from prefloop.report import page_tables as tables
from prefloop.report.charts import (
    RUN_COLOURS,
    Chart,
    distribution_charts,
    round_charts,
    step_charts,
)
from prefloop.report.console import measure_names
from prefloop.report.facts import Evaluated, RunFacts, read_evaluation, read_facts
from prefloop.report.formats import visible

_FOLDER = Path(__file__).parent / "page"
_SCRIPTS = ("text.js", "charts.js", "detail.js", "pairs.js")
# Limit of the packed chains in bytes; the rest of a page is less than 1 MB.
_MAX_PACKED_BYTES = 2_000_000
# Characters of one text in the page; whole texts are in the file beside it.
_MAX_TEXT_LENGTH = 20_000
_HTML_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_MIN_SAMPLE = 20


@dataclass(frozen=True)
class Written:
    """The files of a report, and how many chains the page shows."""

    page: Path
    chains_file: Path | None
    """All chains, gzipped JSON lines, where the page holds only some of them or cut some short."""
    shown: int
    total: int


def write_report(
    folders: Sequence[Path], out: Path, *, limit: int = 1000, evaluations: Sequence[Path] = ()
) -> Written:
    """Write one page about some runs, with at most `limit` of their pairs, rejects and held-out prompts.

    `evaluations` are evaluation.json files, or their folders. Raises RunFolderError if a folder is no run
    or a file is damaged.
    """
    if out.is_dir():
        raise RunFolderError(f"{out} is a folder; name a file with --out")
    runs = [read_facts(folder) for folder in folders]
    evaluated = [subject for path in evaluations for subject in read_evaluation(path, runs)]
    chains_file = out.with_name(f"{out.stem}.pairs.jsonl.gz")
    # An older report and the file beside it stay until the new ones are complete.
    temporary = chains_file.with_name(f".{chains_file.name}.part")
    try:
        total, cut = _write_all(runs, temporary)
        sample, packed = _sample(temporary, total, limit)
        complete = sample == total and not cut
        title = ", ".join(run.name for run in runs)
        sample_note = _sample_note(sample, total, cut)
        text = _render(
            runs, evaluated, title, packed, sample_note, None if complete else chains_file
        )
        if complete:
            chains_file.unlink(missing_ok=True)
        else:
            temporary.replace(chains_file)
        write_atomically(out, text)
    finally:
        temporary.unlink(missing_ok=True)
    return Written(out, None if complete else chains_file, sample, total)


def _write_all(runs: Sequence[RunFacts], path: Path) -> tuple[int, int]:
    """Write every chain to `path`; returns the number of chains, and of those with a text too long for the page."""
    total = cut_count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed time in the header: the same run gives the same bytes.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 4, raw, mtime=0) as file:
        for number, run in enumerate(runs):
            for chain in run.chains():
                values = {"run": number, **chain.to_json()}
                # Plain ASCII, which keeps lone surrogates as escapes.
                file.write(json.dumps(values).encode() + b"\n")
                total += 1
                texts = (*(step.text for step in chain.steps), *(text for _, text in chain.prompt))
                cut_count += any(len(text) > _MAX_TEXT_LENGTH for text in texts)
    return total, cut_count


def _sample(path: Path, total: int, limit: int) -> tuple[int, str]:
    """At most `limit` evenly spaced chains that fit the page: their number, and them packed."""
    count = min(limit, total)
    while True:
        lines = list(_evenly_spaced(path, total, count))
        chains = f"[{','.join(lines)}]".encode()
        packed = base64.b64encode(gzip.compress(chains, 9, mtime=0)).decode()
        if len(packed) <= _MAX_PACKED_BYTES or count <= _MIN_SAMPLE:
            return len(lines), packed
        count = max(_MIN_SAMPLE, int(0.95 * count * _MAX_PACKED_BYTES / len(packed)))


def _evenly_spaced(path: Path, total: int, count: int) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="ascii") as file:
        for index, line in enumerate(file):
            if (index + 1) * count // total > index * count // total:
                yield (
                    line
                    if len(line) <= _MAX_TEXT_LENGTH
                    else json.dumps(_shortened(json.loads(line)))
                )


def _shortened(chain: dict[str, Any]) -> dict[str, Any]:
    for step in chain.get("steps", []):
        if len(step.get("text", "")) > _MAX_TEXT_LENGTH:
            step["cut"] = len(step["text"])
            step["text"] = step["text"][:_MAX_TEXT_LENGTH]
    chain["prompt"] = [
        [role, text]
        if len(text) <= _MAX_TEXT_LENGTH
        else [role, text[:_MAX_TEXT_LENGTH], len(text)]
        for role, text in chain.get("prompt", [])
    ]
    return chain


def _sample_note(shown: int, total: int, cut: int) -> str:
    if shown < total:
        return f"{shown:,} of {total:,} pairs, rejects and held-out prompts are in this page, evenly picked."
    parts = f"All {total:,} pairs, rejects and held-out prompts are in this page."
    return f"{parts} {cut:,} have a text that is cut short in it." if cut else parts


def _render(
    runs: Sequence[RunFacts],
    evaluated: Sequence[Evaluated],
    title: str,
    packed: str,
    sample: str,
    chains_file: Path | None,
) -> str:
    css = _read("style.css")
    js = '(() => {\n"use strict";\n' + "\n".join(map(_read, _SCRIPTS)) + "})();\n"
    names = [
        name
        for name in measure_names([result for run in runs for result in run.results])
        if not name.startswith("train_") and not name.endswith(("_low", "_high"))
    ]
    groups = {
        "round_charts": round_charts(runs, names),
        "step_charts": step_charts(runs),
        "pair_charts": distribution_charts(runs),
    }
    charts = {
        f"{group}-{n}": chart
        for group, charts_of_group in groups.items()
        for n, chart in enumerate(charts_of_group)
    }
    facts = {
        "runs": [run.name for run in runs],
        "charts": {
            key: charts_of_group
            for key, chart in charts.items()
            if (charts_of_group := chart.readable())
        },
    }
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=title,
            css=Markup(css),
            js=Markup(js),
            policy=_security_policy(css, js),
            sections=_sections(bool(evaluated), bool(groups["step_charts"])),
            runs=[_run(n, run) for n, run in enumerate(runs)],
            about=tables.about(runs),
            differs=tables.recipe_differences(runs) if len(runs) > 1 else [],
            evaluations=tables.evaluations(evaluated),
            **{
                name: [_chart(f"{name}-{n}", c) for n, c in enumerate(g)]
                for name, g in groups.items()
            },
            sample=sample,
            beside=chains_file.name if chains_file else None,
            version=version("prefloop"),
            written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            facts=Markup(json.dumps(facts).translate(_HTML_ESCAPES)),
            chains=packed,
        )
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: (
            visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _security_policy(css: str, js: str) -> str:
    hashes = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in (("style", css), ("script", js))
    }
    allowed: Iterable[str] = (
        "default-src 'none'",
        *(f"{kind}-src 'sha256-{value}'" for kind, value in hashes.items()),
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
    )
    return "; ".join(allowed)


def _sections(evaluations: bool, steps: bool) -> list[tuple[str, str]]:
    sections = [("overview", "What was run"), ("rounds", "Rounds")]
    sections += [("evaluations", "Evaluations")] * evaluations
    sections += [("training", "Training")] * steps
    return [*sections, ("rejects", "Rejects"), ("pairs", "Pairs")]


def _run(number: int, run: RunFacts) -> dict[str, Any]:
    return {
        "number": number,
        "colour": number % RUN_COLOURS,
        "name": run.name,
        "notices": tables.notices(run),
        "recipe": run.recipe_text,
        "environment": yaml.safe_dump(run.environment, sort_keys=False, allow_unicode=True),
        "tables": [tables.measures(run, training=training) for training in (False, True)],
        "measured": bool(run.results),
        "rejects": tables.rejects(run),
        "rounds": run.rounds,
    }


def _chart(key: str, chart: Chart) -> dict[str, Any]:
    return {
        "key": key,
        "title": chart.title,
        "note": chart.note,
        "labels": chart.labels,
        "svg": Markup(chart.svg),
    }
