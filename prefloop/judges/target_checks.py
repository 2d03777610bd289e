"""Rules that compare an answer with the prompt's target: same text, same numbers, like length, same form."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from prefloop.judges import EMPTY, NO_TARGET, Judge, OpenJudge, Verdict
from prefloop.records import Prompt

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_BULLET = re.compile(r"^\s*(?:[*•+-]|\d+[.)])\s+\S", re.MULTILINE)
_WITHOUT_MARKS = str.maketrans("", "", string.punctuation + "“”‘’–—…")


class TargetChecks(Judge):
    """Share of the checks that an answer passes, 0 to 1, each against the prompt's target.

    Text: the same words, but for case, punctuation and white space (the normalised exact match of SQuAD, Rajpurkar et
    al. 2016, which drops articles too; here they count). Numbers, where the target has some: the same ones. Length: a
    word count within the factor. Form: as many list items and paragraphs, and the same last mark.
    """

    length_factor: float = Field(default=2.0, gt=1.0)
    """At most so many times longer or shorter than the target, in words."""

    @property
    def needs_target(self) -> bool:
        """Always: responses are compared with the target."""
        return True

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Nothing to load."""
        return _OpenChecks(self.length_factor)


@dataclass(frozen=True)
class _OpenChecks:
    length_factor: float

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return [self._group(p, group) for p, group in zip(prompts, groups, strict=True)]

    def _group(self, prompt: Prompt, group: Sequence[str]) -> Verdict:
        target = (prompt.target or "").strip()
        if not target:
            return NO_TARGET
        if not all(text.strip() for text in group):
            return EMPTY
        passed = [list(self._checks(target, text.strip())) for text in group]
        return tuple(sum(checks) / len(checks) for checks in passed)

    def _checks(self, target: str, answer: str) -> Iterator[bool]:
        wanted, words = _words(target), _words(answer)
        yield words == wanted
        if numbers := _numbers(target):
            yield _numbers(answer) == numbers
        shorter, longer = sorted((len(words), len(wanted)))
        yield longer <= self.length_factor * max(1, shorter)
        yield _form(answer) == _form(target)


def _words(text: str) -> list[str]:
    return text.casefold().translate(_WITHOUT_MARKS).split()


def _numbers(text: str) -> Counter[str]:
    """The text's numbers, "1,000" as "1000"."""
    return Counter(number.replace(",", "") for number in _NUMBER.findall(text))


def _form(text: str) -> tuple[int, int, str]:
    """List items, paragraphs, and the last mark ("" after a letter or digit)."""
    last = text[-1] if not text[-1].isalnum() else ""
    return len(_BULLET.findall(text)), len(re.split(r"\n\s*\n", text)), last
