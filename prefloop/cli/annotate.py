"""`prefloop annotate`: people compare the answers of two policies in a browser."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefloop.cli.switches import results_console
from prefloop.errors import DataError, counted

if TYPE_CHECKING:
    from prefloop.annotate.items import AnnotationPlan, Comparison


def annotate(  # noqa: PLR0913 - an option of the command line is a parameter
    run_a: Annotated[
        str, typer.Argument(metavar="A", help="A run, RUN@ROUND, or a file of answers.")
    ],
    run_b: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    votes: Annotated[
        Path | None,
        typer.Option("--votes", help="The file of votes.  [default: annotations/A-vs-B.jsonl]"),
    ] = None,
    instructions: Annotated[
        Path | None,
        typer.Option("--instructions", help="A text for the annotators, shown as it is."),
    ] = None,
    each: Annotated[
        int | None, typer.Option("--each", min=1, help="Items for each annotator.  [default: all]")
    ] = None,
    shared: Annotated[
        int | None,
        typer.Option(
            "--shared", min=0, help="Of them, how many everybody sees.  [default: a fifth]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws order and sides.")] = 0,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8765,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than this let people in.")
    ] = "127.0.0.1",
    report: Annotated[
        bool, typer.Option("--report", help="Print the results so far; start no server.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The results as one JSON object.")
    ] = False,
) -> None:
    """Let people compare the held-out answers of two policies, blind; Ctrl-C ends it with the results."""
    from prefloop.annotate.items import make_plan, read_comparison
    from prefloop.annotate.results import results
    from prefloop.annotate.votes import read_votes

    comparison = read_comparison(run_a, run_b)
    path = votes or _default_votes(comparison)
    if report:
        stored = read_votes(path, comparison)
        outcome = results(comparison, stored.ballots, torn_bytes=stored.torn_bytes)
    else:
        text = None if instructions is None else _text(instructions)
        plan = make_plan(seed, each, shared)
        outcome = _serve(comparison, plan, path, text, host, port, to_stderr=as_json)
    if as_json:
        typer.echo(json.dumps(outcome, indent=1, ensure_ascii=False))
        return
    from prefloop.report.annotations import show_annotations

    show_annotations(outcome, results_console())


def _serve(
    comparison: Comparison,
    plan: AnnotationPlan,
    path: Path,
    instructions: str | None,
    host: str,
    port: int,
    *,
    to_stderr: bool,
) -> dict[str, Any]:
    """Serve until Ctrl-C; returns the results."""
    from prefloop.annotate.results import results
    from prefloop.annotate.server import AnnotationServer, is_loopback
    from prefloop.annotate.service import AnnotationService
    from prefloop.annotate.votes import VoteFile

    def say(line: str) -> None:
        typer.echo(line, err=to_stderr)
        (sys.stderr if to_stderr else sys.stdout).flush()

    file = VoteFile(path, comparison, plan)
    service = AnnotationService(comparison, plan, file, instructions=instructions, say=say)
    try:
        with AnnotationServer(service, host, port) as server:
            if file.torn_bytes:
                say(
                    f"note: the last line of {path} was torn ({counted(file.torn_bytes, 'byte')}) and is cut off; that vote does not count"
                )
            if not is_loopback(host):
                typer.echo(
                    "warning: anybody who gets this link can read the answers and vote, from other machines "
                    "too, and nothing is encrypted; prefer the default --host with an SSH tunnel",
                    err=True,
                )
            say(
                f"{counted(len(comparison.items), 'item')}, votes in {path}\nopen {server.link}\nCtrl-C ends it"
            )
            server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        typer.echo("", err=True)  # the terminal has printed ^C
    finally:
        service.close()
    return results(comparison, file.ballots)


def _default_votes(comparison: Comparison) -> Path:
    names = (
        re.sub(r"[^\w@.-]+", "-", Path(name).name.removesuffix(".jsonl"))
        for name in comparison.names.values()
    )
    return Path("annotations") / f"{'-vs-'.join(names)}.jsonl"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8; save the file as UTF-8") from error
