"""A table of texts on a console: columns in line, never cut or wrapped where nobody watches."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefloop.report.console import printable


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print rows below a head; the first column is flush left, numbers are flush right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # As wide as it needs: a number that is cut off is worse than a line that the terminal wraps.
    wide = console.options.update(width=10_000, max_width=10_000)
    for line in console.render_lines(table, wide, pad=False):
        console.print(Text("".join(piece.text for piece in line).rstrip()), soft_wrap=True)
