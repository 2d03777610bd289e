"""A verdict read from a judge's written reply: one clear verdict, or the reason why there is none.

Nothing is guessed. A verdict is a line of its own ("4", "Rating: 4/5", "**B**", "[[A]]"); numbers and
letters inside sentences are not verdicts, and two different verdicts are none.
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
    numbers = options[0].isdigit()
    choice = "|".join(map(re.escape, options))
    scale = rf"(?:\s*/\s*{re.escape(options[-1])})?" if numbers else ""
    line_form = re.compile(
        rf"{_LABEL}{'' if numbers else _SIDE_WORD}({choice}){scale}\s*[.!]?",
        re.IGNORECASE,
    )
    # NFKC turns full-width digits, letters and colons into plain ones.
    lines = [
        _DECORATION.sub(" ", line).strip()
        for line in unicodedata.normalize("NFKC", reply).splitlines()
    ]
    found = {match[1].upper() for line in lines if (match := line_form.fullmatch(line))}
    if len(found) > 1:
        raise ValueError(TWO_VERDICTS)
    if not found:
        raise ValueError(NO_VERDICT)
    return found.pop()
