"""Gates: when a pair is not worth training on. Each rejection has a fixed phrase and is counted."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field

from prefloop.records import Response
from prefloop.text import edit_share, fold_whitespace

_META_TALK = re.compile(
    r"^\W*(sure|certainly|of course|okay)?\W*"
    r"((here(['’]s| is| are))|this is|below is|i(['’]ve| have) (made|rewritten|revised|improved|added))\b"
    r"[^.\n]{0,80}\b(answer|response|version|text|sentence|rewrite|revision|suggestion|flaw|draft)s?\b"
    r"|^\W*(the )?(improved|refined|revised|rewritten|better|new|final|flawed|corrected) "
    r"(answer|response|version)\b"
    r"|\bas an (expert )?advisor\b",
    re.IGNORECASE,
)


def is_meta_talk(text: str) -> bool:
    """Whether an answer talks about being an answer ("Here is the improved version") instead of being one."""
    return _META_TALK.search(text) is not None


class Gates(BaseModel):
    """What a pair must satisfy. Empty answers never pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cut_off: bool = True
    """Reject an answer that the length limit cut off."""
    identical: bool = True
    """Reject two answers that are equal up to whitespace."""
    meta_talk: bool = True
    """Reject an answer that talks about itself ("Here is the improved answer: ...")."""
    max_edit_share: float | None = Field(default=None, gt=0.0, le=1.0)
    """Reject when more than this share of words differs: a subtle flaw does not rewrite everything."""
    max_length_ratio: float | None = Field(default=None, ge=1.0)
    """Reject when one answer has more than this many times the other's characters."""

    def reason_against(self, first: Response, second: Response) -> str | None:
        """Why this pair must not be trained on; None when it may."""
        texts = (first.text, second.text)
        lengths = sorted(len(text.strip()) for text in texts)
        if lengths[0] == 0:
            return "empty answer"
        if self.cut_off and "length" in (first.finish, second.finish):
            return "cut off"
        if self.identical and fold_whitespace(texts[0]) == fold_whitespace(texts[1]):
            return "identical"
        if self.meta_talk and any(is_meta_talk(text) for text in texts):
            return "meta talk"
        if self.max_length_ratio is not None and lengths[1] > self.max_length_ratio * lengths[0]:
            return "length ratio"
        if self.max_edit_share is not None and edit_share(*texts) > self.max_edit_share:
            return "edit share"
        return None
