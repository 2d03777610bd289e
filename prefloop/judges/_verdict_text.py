"""Parse a verdict from a judge's written reply.

A verdict is a line of its own ("4", "Rating: 4/5", "**B**", "[[A]]"); numbers and letters inside sentences do
not count, and two different verdicts are a failure.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

NO_VERDICT = "no verdict in the judge's reply"
TWO_VERDICTS = "more than one verdict in the judge's reply"

_DECORATION = re.compile(r"[*_`\"'“”«»\[\](){}]+")
# "Rating:", "Score =", "Bewertung:", or the word before a side. What has neither colon nor "=" is prose.
_LABEL = r"(?:[^\W\d_][\w ]{0,30}[:=]\s*)?"
_SIDE_WORD = r"(?:(?:answer|response|assistant|option)\s+)?"


def read_verdict(reply: str, options: Sequence[str]) -> str:
    """The one of `options` (ratings "1".."5", or sides "A", "B", "C") that the reply names.

    Raises ValueError with a fixed reason, NO_VERDICT or TWO_VERDICTS.
    """
    is_rating = options[0].isdigit()
    choice = "|".join(map(re.escape, options))
    scale = rf"(?:\s*/\s*{re.escape(options[-1])})?" if is_rating else ""
    line_form = re.compile(
        rf"{_LABEL}{'' if is_rating else _SIDE_WORD}({choice}){scale}\s*[.!]?",
        re.IGNORECASE,
    )
    # NFKC turns full-width digits, letters and colons into plain ones.
    lines = [
        _DECORATION.sub(" ", line).strip()
        for line in unicodedata.normalize("NFKC", reply).splitlines()
    ]
    verdicts = {match[1].upper() for line in lines if (match := line_form.fullmatch(line))}
    if len(verdicts) > 1:
        raise ValueError(TWO_VERDICTS)
    if not verdicts:
        raise ValueError(NO_VERDICT)
    return verdicts.pop()
