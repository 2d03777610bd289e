"""Texts and tables safe to show: escaped for a console, in Markdown and LaTeX, with differences marked."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefloop.data.text_distance import Kind, Span

# What has no picture of its own and changes how its neighbours look or are read: controls, marks and overrides of
# writing direction, spaces without width, and halves of a character that lost the other one.
# The zero-width joiner is left alone: emoji are made with it.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with every hidden character as ⟨U+202E⟩; what comes out can be written as UTF-8."""
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


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


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int) -> str:
    """A table as GitHub reads it; the first `texts` columns are flush left, numbers flush right."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (head, rule, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def latex_text(text: str) -> str:
    """The text as LaTeX prints it: nothing in it is a command."""
    return "".join(_LATEX.get(c, c) for c in text)


MARKS: dict[Kind, tuple[str, str]] = {"same": ("", ""), "old": ("[-", "-]"), "new": ("{+", "+}")}

STYLES: dict[Kind, str] = {"same": "", "old": "bold red", "new": "bold green"}


def marked(spans: Sequence[Span], hide: Kind | None = None) -> str:
    """Spans as plain text, `[-old-]` and `{+new+}`; spans of kind `hide` are left out."""
    return "".join(MARKS[kind][0] + text + MARKS[kind][1] for kind, text in spans if kind != hide)


def coloured(spans: Sequence[Span], hide: Kind | None = None) -> Text:
    """Spans as a rich text, the old red, the new green; the text is never read as markup."""
    return Text.assemble(*((text, STYLES[kind]) for kind, text in spans if kind != hide))


# C0 except tab and newline, DEL, C1: a model's answer must not steer the terminal it is shown on.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """The text with control characters replaced by their visible pictures, other hidden ones by numbers."""
    return visible(text.translate(_CONTROLS))
