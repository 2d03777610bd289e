"""`prefloop compare`: variants times seeds as one run with one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefloop.cli.switches import note, results_console
from prefloop.errors import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefloop.compare.file import Cell, Comparison


def compare(
    comparison: Annotated[
        Path, typer.Argument(metavar="COMPARE.yaml", help="A comparison: docs/compare.md.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The comparison's folder.  [default: runs/NAME]")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change an option of every variant; repeatable."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="VARIANT", help="Play only this variant; repeatable."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Cells at a time.")] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Look for what would stop it; load no model.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Play nothing; table what has been played.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, no tables.")] = False,
) -> None:
    """Play variants of a recipe with several seeds; table means, costs, and which differences are noise.

    The same command goes on where it stopped. Exits with 1 where a cell failed; the others are played.
    """
    from prefloop.compare.file import cells, check_judges, load_comparison
    from prefloop.compare.run import describe_reuse
    from prefloop.recipe.check import check_recipe
    from prefloop.run_folder import alone_in

    loaded = load_comparison(comparison, overrides or ())
    folder = out or Path("runs") / comparison.stem
    all_cells, notes = cells(loaded, folder)
    selected = _selected(all_cells, loaded, only or ())
    notes += [] if table else check_judges(loaded)
    for cell in () if table else selected:
        notes += [f"variant {cell.variant}: {text}" for text in check_recipe(cell.recipe)]
    for text in dict.fromkeys(notes):
        note(f"note: {text}")
    if check:
        for line in describe_reuse(selected):
            typer.echo(line)
        typer.echo(f"{comparison.stem}: {counted(len(selected), 'cell')}, ok")
        return
    with alone_in(folder, "comparison"):
        failed = _play_and_tabulate(
            loaded, all_cells, [] if table else selected, folder, jobs, as_json
        )
    if failed:
        raise typer.Exit(1)


def _selected(all_cells: Sequence[Cell], loaded: Comparison, only: Sequence[str]) -> list[Cell]:
    from prefloop.errors import RecipeError, nearest

    for name in only:
        if name not in loaded.variants:
            known = list(loaded.variants)
            raise RecipeError(f"--only {name}: no such variant; {nearest(name, known)}")
    return [cell for cell in all_cells if not only or cell.variant in only]


def _play_and_tabulate(
    loaded: Comparison,
    all_cells: Sequence[Cell],
    selected: Sequence[Cell],
    folder: Path,
    jobs: int,
    as_json: bool,
) -> bool:
    """Run the selected cells and write all tables; returns whether a cell failed."""
    from prefloop.compare.run import play
    from prefloop.compare.table import tabulate
    from prefloop.manifest import write_atomically
    from prefloop.report.comparison import latex, markdown, show_comparison

    other_cells = [cell for cell in all_cells if cell not in selected]
    failed = play(selected, jobs=jobs, say=note, other_cells=other_cells)
    report = tabulate(loaded, all_cells, failed, folder)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "comparison.json", f"{text}\n")
    write_atomically(folder / "comparison.md", markdown(report))
    write_atomically(folder / "comparison.tex", latex(report))
    if as_json:
        typer.echo(text)
    else:
        show_comparison(report, results_console())
        typer.echo(f"\ntables  {folder}/comparison.md, .tex, .json")
    return bool(failed)
