"""Where a reasoning model's thought ends and its answer begins, in text."""

from __future__ import annotations

import re
from typing import NamedTuple


class Thought(NamedTuple):
    """How a family of models marks its thought. In each, what follows `close` is the answer."""

    open: str
    close: str
    end: str = ""
    """Where the thought itself ends, if that is before `close`."""

    def opened_by(self, text: str) -> bool:
        """Whether a prompt ends inside a thought."""
        return text.rstrip().endswith(self.open.rstrip())

    def closing(self, prompt: str) -> str:
        """What ends the thought that a prompt has opened, without one."""
        return f"\n{self.close}\n\n" if prompt.endswith("\n") else self.close


THOUGHTS = (
    Thought("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", "<|end|>"),
    Thought("<|START_THINKING|>", "<|END_THINKING|>"),
    Thought("<|inner_prefix|>", "<|inner_suffix|>"),
    Thought("<|channel>thought\n", "<channel|>"),
    Thought("<seed:think>", "</seed:think>"),
    Thought("[THINK]", "[/THINK]"),
    Thought("◁think▷", "◁/think▷"),
    Thought("<longcat_think>", "</longcat_think>"),
    Thought("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),
    Thought("<think>", "</think>"),
    Thought("<thinking>", "</thinking>"),
    Thought("<reasoning>", "</reasoning>"),
)


_TAG = r"(?:<[^<>\s]+>|\[[^\[\]]+\])"


def thought_of(source: str, tokens: frozenset[str], between: tuple[str, str]) -> Thought | None:
    """The thought that a template writes or cuts, else the one that the tokenizer has tokens for.

    `between` is what the template put before and after a thought that it was given ("" where it left it out).
    """
    for thought in THOUGHTS:
        if thought.close in source:
            return thought
    before, after = between
    begin, end = re.search(_TAG + r"$", before.rstrip()), re.match(_TAG, after.lstrip())
    if begin and end:
        only_tags = not re.sub(_TAG, "", after).strip()
        return Thought(begin[0], end[0] if only_tags else after.strip(), end[0])
    for thought in THOUGHTS:
        if thought.close in tokens and thought.open in tokens:
            return thought
    return None
