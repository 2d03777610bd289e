"""Marks and colours of a difference."""

from prefloop.data.text_distance import spans
from prefloop.report.formats import coloured, marked

FOUND = spans("it is [bold]red[/bold] here", "it was green here")


def test_marks_show_old_then_new():
    assert marked(FOUND) == "it [-is [bold]red[/bold]-]{+was green+} here"


def test_one_side_can_be_hidden():
    assert marked(FOUND, "old") == "it {+was green+} here"
    assert marked(FOUND, "new") == "it [-is [bold]red[/bold]-] here"


def test_coloured_text_is_the_text_itself():
    text = coloured(FOUND, "new")
    assert text.plain == "it is [bold]red[/bold] here"
    assert [(text.plain[s.start : s.end], s.style) for s in text.spans] == [
        ("is [bold]red[/bold]", "bold red")
    ]
