"""`prefloop push`: a run's policy and pairs to the Hugging Face Hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefloop.cli.report import RunArgument
from prefloop.cli.switches import Verbosity, note
from prefloop.errors import counted

if TYPE_CHECKING:
    from prefloop.run.push import Shipment


def push(
    run_folder: RunArgument,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository.")],
    merged: Annotated[
        Path | None,
        typer.Option(
            "--merged", metavar="FOLDER", help="Send this model of prefloop merge, not the adapter."
        ),
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs/--no-pairs", help="Send the pairs, as OWNER/NAME-pairs.")
    ] = True,
    public: Annotated[
        bool, typer.Option("--public", help="For all to see; else what is made is private.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Add a commit to a repository that is there already.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send; else only show what would go.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what would go to the Hugging Face Hub: policy, card, recipe, pairs; with --yes, send it.

    The same command goes on with a push that was cut off.
    """
    from prefloop.run.push import prepare, send

    shipments = prepare(run_folder, repo_id, merged=merged, pairs=pairs)
    addresses: list[str] = []
    if yes:
        _bars_for_terminals_only()
        addresses = send(run_folder, shipments, public=public, update=update, say=note)
    if as_json:
        typer.echo(json.dumps(_as_json(shipments, public, addresses), indent=1))
        return
    for shipment in shipments:
        for line in _lines(shipment, public):
            typer.echo(line)
    for address in addresses:
        typer.echo(f"sent     {address}")
    if not yes:
        typer.echo("nothing was sent; the same command with --yes sends it")


def _bars_for_terminals_only() -> None:
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    hub_logging: Any = logging
    hub_logging.set_verbosity_error()
    if Verbosity.level == "quiet" or not sys.stderr.isatty():
        disable_progress_bars()


def _lines(shipment: Shipment, public: bool) -> list[str]:
    files = shipment.files
    seen = "public" if public else "private"
    head = (
        f"{shipment.kind} {shipment.repo_id}, {seen}: {counted(len(files), 'file')}, "
        f"{_size(sum(files.values()))}"
    )
    width = max(map(len, files), default=0)
    listed = [f"  {name:{width}}  {_size(size):>9}" for name, size in files.items()]
    return [head, *listed, *(f"  note: {text}" for text in shipment.notes)]


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _as_json(shipments: list[Shipment], public: bool, addresses: list[str]) -> dict[str, object]:
    return {
        "sent": bool(addresses),
        "private": not public,
        "addresses": addresses,
        "repositories": [
            {
                "id": shipment.repo_id,
                "type": shipment.kind,
                "files": shipment.files,
                "notes": list(shipment.notes),
            }
            for shipment in shipments
        ],
    }
