"""Escape texts for the console, Markdown and LaTeX; print tables; mark differences."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefloop.data.text_distance import Kind, Span

# Invisible characters that change how text looks or reads: controls, direction marks and overrides, zero-width
# spaces, and lone surrogates. The zero-width joiner is left alone: emoji are made with it.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with every invisible character written as ⟨U+202E⟩; the result can be encoded as UTF-8."""
    return _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print a table; the first column is flush left, the others flush right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # Full width: a number cut off is worse than a line that the terminal wraps.
    wide = console.options.update(width=10_000, max_width=10_000)
    for line in console.render_lines(table, wide, pad=False):
        console.print(Text("".join(piece.text for piece in line).rstrip()), soft_wrap=True)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int) -> str:
    """A GitHub Markdown table; the first `texts` columns are flush left, the others flush right."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (head, rule, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def latex_text(text: str) -> str:
    """The text escaped for LaTeX: nothing in it is a command."""
    return "".join(_LATEX.get(c, c) for c in text)


MARKS: dict[Kind, tuple[str, str]] = {"same": ("", ""), "old": ("[-", "-]"), "new": ("{+", "+}")}

STYLES: dict[Kind, str] = {"same": "", "old": "bold red", "new": "bold green"}


def marked(spans: Sequence[Span], hide: Kind | None = None) -> str:
    """Spans as plain text, `[-old-]` and `{+new+}`; spans of kind `hide` are left out."""
    return "".join(MARKS[kind][0] + text + MARKS[kind][1] for kind, text in spans if kind != hide)


def coloured(spans: Sequence[Span], hide: Kind | None = None) -> Text:
    """Spans as a rich text, old ones red, new ones green; markup in the text is not interpreted."""
    return Text.assemble(*((text, STYLES[kind]) for kind, text in spans if kind != hide))


# C0 except tab and newline, DEL, C1: a model's answer must not control the terminal.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """The text with control characters replaced by their symbols, other invisible ones by code points."""
    return visible(text.translate(_CONTROLS))
