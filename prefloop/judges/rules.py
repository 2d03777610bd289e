"""Rules in the manner of IFEval that a program checks, without a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from prefloop.judges import EMPTY, Judge, OpenJudge, Verdict
from prefloop.records import Prompt

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial

Check = Callable[[str], bool]

_WORD = re.compile(r"\w+(?:['’]\w+)*")
# A sentence ends with its mark and whatever closes it; Chinese and Japanese marks need no space after.
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*|[।؟]+(?=\s|$)")
_BULLET = re.compile(r"^\s*[*•+-]\s+\S", re.MULTILINE)
_COMMA = re.compile("[,，、،]")
_FENCED = re.compile(r"^```(?:json)?\s*\n(.*)\n```$", re.DOTALL | re.IGNORECASE)


class Rules(Judge):
    """Fraction of the given rules that an answer follows, 0 to 1; each value of a list is a rule of its own.

    The kinds are those of IFEval (Zhou et al. 2023, arXiv:2311.07911, table 1) that hold for a whole data
    set and in any language; prompts with instructions of their own need a judge of kind `python`.
    """

    example: ClassVar = {"max_characters": 12, "exclude": ["nobody"]}

    min_words: int | None = Field(default=None, ge=1)
    """Fewest words; a word is a run of letters and digits, so for languages without spaces use characters."""
    max_words: int | None = Field(default=None, ge=1)
    """Most words."""
    min_characters: int | None = Field(default=None, ge=1)
    """Fewest characters, white space at the ends left out."""
    max_characters: int | None = Field(default=None, ge=1)
    """Most characters."""
    max_sentences: int | None = Field(default=None, ge=1)
    """Most sentences, by their end marks."""
    paragraphs: int | None = Field(default=None, ge=1)
    """Exactly so many paragraphs, parted by blank lines."""
    bullets: int | None = Field(default=None, ge=0)
    """Exactly so many lines that begin with *, +, - or •."""
    include: tuple[str, ...] = ()
    """Words or phrases that must occur, in any case."""
    exclude: tuple[str, ...] = ()
    """Words or phrases that must not occur."""
    starts_with: str | None = None
    """Text that the answer must begin with."""
    ends_with: str | None = None
    """Text that the answer must end with."""
    case: Literal["lower", "upper"] | None = None
    """All letters in lower case, or in upper case."""
    no_commas: bool = False
    """No comma of any script."""
    is_json: bool = False
    """The whole answer is JSON; a Markdown fence around it is allowed."""
    matches: tuple[str, ...] = ()
    """Regular expressions (Python's) that must be found somewhere."""
    matches_not: tuple[str, ...] = ()
    """Regular expressions that must not be found."""

    @model_validator(mode="after")
    def _check_rules(self) -> Rules:
        for pattern in (*self.matches, *self.matches_not):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"judge: {pattern!r} is no regular expression ({error}); correct it"
                ) from error
        for unit in ("words", "characters"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least is not None and most is not None and least > most:
                raise ValueError(
                    f"judge.min_{unit} ({least}) is above judge.max_{unit} ({most}); no answer keeps both"
                )
        if not list(self.checks()):
            raise ValueError("judge 'rules' has no rule; give at least one, such as max_words")
        return self

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Nothing to load; the arguments are not used."""
        return _OpenRules(tuple(self.checks()))

    def checks(self) -> Iterator[Check]:
        """A test of one answer for each rule that is set."""
        yield from self._size_checks()
        yield from (_occurs(_phrase(phrase), expected=True) for phrase in self.include)
        yield from (_occurs(_phrase(phrase), expected=False) for phrase in self.exclude)
        if (start := self.starts_with) is not None:
            yield lambda text: text.startswith(start)
        if (end := self.ends_with) is not None:
            yield lambda text: text.endswith(end)
        if self.case is not None:
            yield str.islower if self.case == "lower" else str.isupper
        if self.no_commas:
            yield _occurs(_COMMA, expected=False)
        if self.is_json:
            yield _is_json
        yield from (_occurs(re.compile(pattern), expected=True) for pattern in self.matches)
        yield from (_occurs(re.compile(pattern), expected=False) for pattern in self.matches_not)

    def _size_checks(self) -> Iterator[Check]:
        yield from _within(count_words, self.min_words, self.max_words)
        yield from _within(len, self.min_characters, self.max_characters)
        yield from _within(count_sentences, None, self.max_sentences)
        if (paragraphs := self.paragraphs) is not None:
            yield lambda text: _count_paragraphs(text) == paragraphs
        if (bullets := self.bullets) is not None:
            yield lambda text: _count_bullets(text) == bullets


@dataclass(frozen=True)
class _OpenRules:
    checks: tuple[Check, ...]

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return [self._group(group) for _, group in zip(prompts, groups, strict=True)]

    def _group(self, group: Sequence[str]) -> Verdict:
        texts = [text.strip() for text in group]
        if not all(texts):
            return EMPTY
        return tuple(sum(check(text) for check in self.checks) / len(self.checks) for text in texts)


def count_words(text: str) -> int:
    """Number of runs of letters and digits; an apostrophe inside does not split them."""
    return len(_WORD.findall(text))


def count_sentences(text: str) -> int:
    """Number of sentences by their end marks; a last one without a mark counts as well."""
    return sum(1 for piece in _SENTENCE_END.split(text) if _WORD.search(piece))


def _within(
    measure: Callable[[str], int], minimum: int | None, maximum: int | None
) -> Iterator[Check]:
    if minimum is not None:
        yield lambda text: measure(text) >= minimum
    if maximum is not None:
        yield lambda text: measure(text) <= maximum


def _occurs(pattern: re.Pattern[str], *, expected: bool) -> Check:
    return lambda text: (pattern.search(text) is not None) == expected


def _count_bullets(text: str) -> int:
    return len(_BULLET.findall(text))


def _count_paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()])


def _phrase(phrase: str) -> re.Pattern[str]:
    """A pattern of the phrase with word boundaries, so that "art" does not occur in "party"."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    left = r"(?<!\w)" if phrase[:1].isalnum() else ""
    right = r"(?!\w)" if phrase[-1:].isalnum() else ""
    return re.compile(left + words + right, re.IGNORECASE)


def _is_json(text: str) -> bool:
    fenced = _FENCED.match(text)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True
