"""`prefloop evaluate`: measures of models and of runs' policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prefloop.cli.switches import note, results_console

SUBJECTS = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL_OR_RUN...",
        help="A model; a run's folder for the policy that it recommends; RUN@ROUND or RUN@start.",
    ),
]
SUITE = Annotated[
    str | None,
    typer.Option(
        "--suite", help="quick, safety, leaderboard or all.  [default: quick, without --measures]"
    ),
]
MEASURES = Annotated[
    Path | None,
    typer.Option("--measures", metavar="FILE", help="YAML: measures and their options."),
]
SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="MEASURE.OPTION=VALUE",
        help="An option; its measure is taken too. Repeatable.",
    ),
]
JUDGE = Annotated[
    str | None,
    typer.Option("--judge", help="As in prefloop judge check.  [default: the one that runs share]"),
]
POLICY = Annotated[
    str | None,
    typer.Option(
        "--policy", metavar="MODEL", help="The model that a judge such as self_judge asks."
    ),
]
INITIAL = Annotated[
    str | None,
    typer.Option(
        "--initial", metavar="MODEL", help="What a MODEL's training started from; runs know theirs."
    ),
]
DATA = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE", help="Prompts.  [default: those that runs hold out]"),
]
LIMIT = Annotated[int | None, typer.Option("--limit", min=1, help="So many items of each measure.")]
SEED = Annotated[int, typer.Option("--seed", min=0, help="Of sampling and intervals.")]
OUT = Annotated[Path, typer.Option("--out", help="Where reports and kept results lie.")]
TRUST = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that comes with a run's model, if its recipe says so."
    ),
]
JSON = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


def evaluate(  # noqa: PLR0913
    subjects: SUBJECTS,
    suite: SUITE = None,
    measures: MEASURES = None,
    overrides: SET = None,
    judge: JUDGE = None,
    policy: POLICY = None,
    initial: INITIAL = None,
    data: DATA = None,
    limit: LIMIT = None,
    seed: SEED = 0,
    out: OUT = Path("evaluations"),
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Measure models and runs' policies, with intervals; what was measured before is not measured again."""
    from prefloop.evaluate.run import Options
    from prefloop.evaluate.run import evaluate as measure
    from prefloop.report.evaluation import show_evaluation, write_tables

    options = Options(
        subjects=subjects,
        out=out,
        suite=suite,
        measures=measures,
        overrides=overrides or (),
        judge=judge,
        policy=policy,
        initial=initial,
        data=data,
        limit=limit,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    report = measure(options, note)
    write_tables(report, out)
    if as_json:
        typer.echo(json.dumps(report, indent=1, ensure_ascii=False))
        return
    show_evaluation(report, results_console())
    typer.echo(f"\nreport   {out}/evaluation.json, evaluation.md, evaluation.tex")
