"""The commands that look at runs: show, watch, report, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prefloop.cli.switches import note, results_console
from prefloop.errors import counted

RunArgument = Annotated[Path, typer.Argument(help="A run's folder, such as runs/quickstart-ial.")]


def show(
    run_folder: RunArgument,
    pair: Annotated[
        str | None,
        typer.Option("--pair", help="One pair's whole chain, by its id or its prompt's."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Pairs to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Show a run's measures by round, and pairs with their differences marked."""
    from prefloop.report.summary import run_json, show_run

    if as_json:
        typer.echo(run_json(run_folder, pair=pair, count=count))
        return
    show_run(run_folder, results_console(), pair=pair, count=count)


def watch(run_folder: RunArgument) -> None:
    """Follow a run that is going on, from another terminal; ends when it does."""
    from prefloop.report.watch import watch_run

    watch_run(run_folder, results_console())


def report(
    run_folders: Annotated[list[Path], typer.Argument(help="Runs' folders.", metavar="RUN ...")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page.  [default: report.html in the first run]"),
    ] = None,
    pairs: Annotated[
        int,
        typer.Option(
            "--pairs", min=1, help="Pairs in the page; all lie beside it if there are more."
        ),
    ] = 1000,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation", metavar="PATH", help="Show this evaluation.json, or its folder's, too."
        ),
    ] = None,
    logratios: Annotated[
        int,
        typer.Option(
            "--logratios",
            min=0,
            metavar="N",
            help="Compute what training changed, token by token, for N pairs a run; loads the models.",
        ),
    ] = 0,
) -> None:
    """Write one page about runs: what was run, curves, rejects, and every pair with all that led to it."""
    from prefloop.report.html import write_report

    if logratios:
        from prefloop.run.logratios import add_logratios

        for folder in run_folders:
            new = add_logratios(folder, logratios)
            note(f"{folder}: log-ratios of {counted(new, 'more pair')}")
    written = write_report(
        run_folders,
        out or run_folders[0] / "report.html",
        limit=pairs,
        evaluations=evaluations or (),
    )
    typer.echo(f"report in {written.page}")
    if written.chains_file:
        typer.echo(
            f"all {counted(written.total, 'pair')} in {written.chains_file}, for that page to open"
        )


def verify(
    run_folder: RunArgument,
    redo: Annotated[
        bool,
        typer.Option(
            "--redo",
            help="Take damaged stages out; the command that began the run makes them again.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare every file of a run with what its manifests say; exits with 1 where one is not as it was written."""
    from prefloop.run.verify import verify_run

    report = verify_run(run_folder, redo=redo)
    if as_json:
        typer.echo(json.dumps(report.__dict__, indent=1, ensure_ascii=False))
    else:
        for sentence in report.damaged:
            typer.echo(sentence)
        for stage in report.redone:
            typer.echo(f"taken out: {stage}")
        typer.echo(
            f"{run_folder}: {counted(report.stages, 'stage')} whole, {len(report.damaged)} damaged"
        )
    if report.damaged and not redo:
        raise typer.Exit(1)


def clean(
    run_folder: RunArgument,
    apply: Annotated[bool, typer.Option("--apply", help="Delete what is shown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a finished run no longer needs, the weights of the rounds that it does not recommend; free it with --apply."""
    from prefloop.run.clean import clean_run

    found = clean_run(run_folder, apply=apply)
    total = sum(part.size for part in found)
    if as_json:
        files = [str(path) for part in found for path in part.files]
        typer.echo(json.dumps({"bytes": total, "files": files, "freed": apply}, indent=1))
        return
    for part in found:
        typer.echo(f"{part.round_dir.path}  {part.size / 1e6:.1f} MB  {part.what}")
    if apply or not found:
        typer.echo(f"{run_folder}: {total / 1e6:.1f} MB freed")
    else:
        typer.echo(f"{run_folder}: {total / 1e6:.1f} MB could be freed; --apply does so")
