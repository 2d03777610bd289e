"""Gates: filters of pairs that should not be trained on. Each rejection has a fixed phrase and is counted."""

from __future__ import annotations

import re

from pydantic import Field

from prefloop.config import Options
from prefloop.data.text_distance import edit_share, fold_whitespace
from prefloop.records import Candidates, Reject, Response

_HERE = r"(?:here(?:['’]s| is| are)|below (?:is|are))"
# "A version of the poem", "a response to the complaint" and "three suggestions" are what users ask for.
_ANSWER = (
    r"(?:rewrite|revision|draft"
    r"|(?:answer|response)s?(?! to (?!(?:the|this|your) (?:question|task|prompt)))"
    r"|versions?(?! of (?!(?:the|my|your) (?:\w+ )?(?:answer|response|draft))))\b"
)
_REVISED = (
    r"(?:the |my |your |an? )?(?:improved|refined|revised|rewritten|corrected|updated|modified"
    rf"|polished|enhanced|flawed|degraded)(?: and \w+)? {_ANSWER}"
)
_OPENINGS = (
    rf"(?:{_HERE}|this is) {_REVISED}",
    rf"(?:{_HERE}|this is) (?:the|my|an?) (?:new|better|final) {_ANSWER}",
    rf"{_HERE} (?:the|my|your|an?) (?=(?:answer|response)\b){_ANSWER}",
    rf"{_HERE} [^.:\n]{{0,40}}\bwith (?:one|an?) (?:\w+ )?(?:flaw|mistake|error)\b",
    rf"{_REVISED}(?:\W*[:\n]|,? (?:is|with|that)\b)",
    r"(?:new|better) (?:answer|response|version)\W*:",
    r"i(?:['’]ve| have) (?:made|improved|revised|rewritten|refined|updated|changed|added)\b"
    r"[^.\n]{0,60}\b(?:the|my|this) (?:\w+ )?(?:answer|response|version|suggestion)s?\b",
    r"(?:based on|following|according to) (?:the|your|these) (?:\w+ )?suggestions?\b",
    r"(?:the|your|my) (?:last|previous|old|original) (?:answer|response)s?\b",
    r"suggestions? for improv",
    r"as an (?:\w+ )?advisor,? i\b",
)
_META_TALK = re.compile(
    rf"^\W*(?:(?:sure|certainly|of course|ok|okay|absolutely)\b\W*)?(?:{'|'.join(_OPENINGS)})",
    re.IGNORECASE,
)


def is_meta_talk(text: str) -> bool:
    """Whether a text talks about itself as an answer ("Here is the improved version") instead of answering."""
    return _META_TALK.search(text) is not None


REMEDIES = {
    "cut off": "method.gates.cut_off: false, or a larger method.sampling.max_new_tokens",
    "identical": "method.gates.identical: false",
    "meta talk": "method.gates.meta_talk: false",
    "length ratio": "a larger method.gates.max_length_ratio",
    "edit share": "a larger method.gates.max_edit_share",
}
"""What in a recipe would let pass what a gate rejects, by the gate's phrase."""


class Gates(Options):
    """Conditions that a pair must satisfy. Empty answers never pass."""

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

    def reject(self, group: Candidates, first: str, second: str) -> Reject | None:
        """The reject of a group whose responses `first` and `second` fail a gate; None where they pass."""
        one, other = group.responses[first], group.responses[second]
        reason = self.reason_against(one, other)
        if reason is None:
            return None
        detail = f"{first}: {one.text!r}; {second}: {other.text!r}"
        return Reject(prompt_id=group.prompt.id, stage="pair", reason=reason, detail=detail)

    def reason_against(self, first: Response, second: Response) -> str | None:
        """The gate that the pair fails, as a fixed phrase; None where it passes."""
        texts = (first.text, second.text)
        lengths = sorted(len(text.strip()) for text in texts)
        # First, as an answer that was cut off in its thought is empty.
        if self.cut_off and "length" in (first.finish, second.finish):
            return "cut off"
        if lengths[0] == 0:
            return "empty answer"
        if self.identical and fold_whitespace(texts[0]) == fold_whitespace(texts[1]):
            return "identical"
        if self.meta_talk and any(is_meta_talk(text) for text in texts):
            return "meta talk"
        if self.max_length_ratio is not None and lengths[1] > self.max_length_ratio * lengths[0]:
            return "length ratio"
        if self.max_edit_share is not None and edit_share(*texts) > self.max_edit_share:
            return "edit share"
        return None
