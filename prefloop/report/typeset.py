"""Tables of texts in Markdown, and texts in LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

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
