"""Text that a model or a file brought, made safe to look at: what is invisible or turns the line is shown by name."""

from __future__ import annotations

import re

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
