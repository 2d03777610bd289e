"""The report as one file that a browser opens from disk: nothing is loaded, nothing a model wrote is run.

A hash-based Content-Security-Policy allows this page's own style and script and nothing else. Chains of
pairs are JSON, packed, and reach the page through `textContent`. Where there are more of them than a page should carry,
a sample is in the page and all of them lie beside it, for the page to open.
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
# What the packed chains may take of a page, in bytes; the rest of a page is less than 1 MB.
_BUDGET = 2_000_000
# Of one text; whole texts lie beside the page.
_LONGEST = 20_000
_HTML_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_FLOOR = 20


@dataclass(frozen=True)
class Written:
    """What a report consists of."""

    page: Path
    beside: Path | None
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
    evaluated = [found for path in evaluations for found in read_evaluation(path, runs)]
    beside = out.with_name(f"{out.stem}.pairs.jsonl.gz")
    # An older report and the file beside it stay as they are until the new ones are whole.
    temporary = beside.with_name(f".{beside.name}.part")
    try:
        total, cut = _write_all(runs, temporary)
        sample, packed = _sample(temporary, total, limit)
        whole = sample == total and not cut
        title = ", ".join(run.name for run in runs)
        about = _about_sample(sample, total, cut)
        text = _render(runs, evaluated, title, packed, about, None if whole else beside)
        if whole:
            beside.unlink(missing_ok=True)
        else:
            temporary.replace(beside)
        write_atomically(out, text)
    finally:
        temporary.unlink(missing_ok=True)
    return Written(out, None if whole else beside, sample, total)


def _write_all(runs: Sequence[RunFacts], path: Path) -> tuple[int, int]:
    """Write every chain to `path`; how many there are, and how many have a text too long for the page."""
    total = cut = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed time in the header: the same run gives the same bytes.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 4, raw, mtime=0) as file:
        for number, run in enumerate(runs):
            for chain in run.chains():
                values = {"run": number, **chain.to_json()}
                # Plain ASCII: half a surrogate pair is kept as what it is.
                file.write(json.dumps(values).encode() + b"\n")
                total += 1
                texts = (*(step.text for step in chain.steps), *(text for _, text in chain.prompt))
                cut += any(len(text) > _LONGEST for text in texts)
    return total, cut


def _sample(path: Path, total: int, limit: int) -> tuple[int, str]:
    """As many evenly spaced chains as the page can carry, packed; how many they are."""
    wanted = min(limit, total)
    while True:
        lines = list(_every(path, total, wanted))
        chains = f"[{','.join(lines)}]".encode()
        packed = base64.b64encode(gzip.compress(chains, 9, mtime=0)).decode()
        if len(packed) <= _BUDGET or wanted <= _FLOOR:
            return len(lines), packed
        wanted = max(_FLOOR, int(0.95 * wanted * _BUDGET / len(packed)))


def _every(path: Path, total: int, wanted: int) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="ascii") as file:
        for n, line in enumerate(file):
            if (n + 1) * wanted // total > n * wanted // total:
                yield line if len(line) <= _LONGEST else json.dumps(_shortened(json.loads(line)))


def _shortened(chain: dict[str, Any]) -> dict[str, Any]:
    for step in chain.get("steps", []):
        if len(step.get("text", "")) > _LONGEST:
            step["cut"] = len(step["text"])
            step["text"] = step["text"][:_LONGEST]
    chain["prompt"] = [
        [role, text] if len(text) <= _LONGEST else [role, text[:_LONGEST], len(text)]
        for role, text in chain.get("prompt", [])
    ]
    return chain


def _about_sample(shown: int, total: int, cut: int) -> str:
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
    beside: Path | None,
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
        f"{group}-{n}": chart for group, found in groups.items() for n, chart in enumerate(found)
    }
    facts = {
        "runs": [run.name for run in runs],
        "charts": {key: found for key, chart in charts.items() if (found := chart.readable())},
    }
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=title,
            css=Markup(css),
            js=Markup(js),
            policy=_policy(css, js),
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
            beside=beside.name if beside else None,
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


def _policy(css: str, js: str) -> str:
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
    found = [("overview", "What was run"), ("rounds", "Rounds")]
    found += [("evaluations", "Evaluations")] * evaluations
    found += [("training", "Training")] * steps
    return [*found, ("rejects", "Rejects"), ("pairs", "Pairs")]


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
