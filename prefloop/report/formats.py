"""Differences between two texts, shown: colours where there are some, marks where there are none."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from prefloop.data.text_distance import Kind, Span

MARKS: dict[Kind, tuple[str, str]] = {"same": ("", ""), "old": ("[-", "-]"), "new": ("{+", "+}")}
STYLES: dict[Kind, str] = {"same": "", "old": "bold red", "new": "bold green"}


def marked(spans: Sequence[Span], hide: Kind | None = None) -> str:
    """Spans as plain text, `[-old-]` and `{+new+}`; spans of kind `hide` are left out."""
    return "".join(MARKS[kind][0] + text + MARKS[kind][1] for kind, text in spans if kind != hide)


def coloured(spans: Sequence[Span], hide: Kind | None = None) -> Text:
    """Spans as a rich text, the old red, the new green; the text is never read as markup."""
    return Text.assemble(*((text, STYLES[kind]) for kind, text in spans if kind != hide))
