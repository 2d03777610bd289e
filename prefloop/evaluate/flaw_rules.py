"""Which kind of flaw a rejected answer has, beside the chosen one it was made from: by rules on words (English only).

The kinds are those that AROP section 5.4 tells apart, with "other" where the rules can name none. They look at
which words differ, not at what is true: a synonym passes for a factual flaw.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from typing import Literal, NamedTuple, get_args

from prefloop.data.text_distance import edit_share, fold_whitespace, spans
from prefloop.evaluate.safety import refuses

Kind = Literal[
    "factual",
    "number",
    "over-qualified",
    "tone",
    "omission",
    "refusal",
    "toxic",
    "rewritten",
    "other",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
REWRITTEN_FROM = 0.5
"""Share of words that differ above which an answer is another one; as in AROP's gates."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million "
    "billion half double twice first second third fourth fifth"
)
_HEDGES = _words(
    "may might could perhaps possibly probably maybe potentially likely seems seem seemingly appears apparently "
    "arguably generally usually often sometimes typically roughly somewhat presumably supposedly allegedly mostly "
    "largely relatively fairly partly unclear uncertain depends depending suggest suggests believed"
)
_TONE = _words(
    "please thanks thank sorry kindly welcome dear sir madam glad happy sad love hate awesome amazing wonderful "
    "terrible awful horrible great fantastic ugh wow oh hey hi hello gosh damn silly obviously clearly duh whatever "
    "honestly frankly unfortunately fortunately sadly luckily hopefully delighted furious excited annoying boring"
)
_TOXIC = _words(
    "stupid idiot idiots idiotic moron morons dumb loser losers trash scum pathetic worthless disgusting hate "
    "kill bastard bitch crap shit fuck fucking fucked ass asshole damned bloody retard retarded whore slut"
)
_NEGATIONS = _words(
    "not no never none nothing neither nor cannot can't don't doesn't didn't isn't aren't wasn't weren't won't "
    "wouldn't shouldn't couldn't hasn't haven't hadn't without"
)
_FUNCTION = _words(
    "a an the this that these those there here it its he him his she her hers they them their we us our you your i "
    "my me mine who whom whose which what when where why how while if then than as so and or but because of in on at "
    "by to from for with about into onto over under up down out off through during between is are was were be been "
    "being am do does did have has had having will would shall should can must get gets got going go also too very "
    "just only even still again once such own same some any each every both all more most much many other another ahead"
)
_EMPTY = _FUNCTION | _HEDGES | _TONE
"""Words that say nothing of the matter."""

RULES = sha256(
    repr(
        [sorted(words) for words in (_NUMBERS, _HEDGES, _TONE, _TOXIC, _NEGATIONS, _FUNCTION)]
    ).encode()
).hexdigest()[:8]
"""Hash of the word lists, for reports."""


class Edit(NamedTuple):
    """The words that only one of two answers has where they differ, in lower case and without punctuation."""

    removed: tuple[str, ...]
    added: tuple[str, ...]

    @classmethod
    def between(cls, chosen: str, rejected: str) -> Edit:
        """The edit that makes the rejected answer of the chosen one."""
        found = spans(chosen, rejected)
        removed = (word for span in found if span.kind == "old" for word in _plain(span.text))
        added = (word for span in found if span.kind == "new" for word in _plain(span.text))
        before, after = Counter(removed), Counter(added)
        # A word that moved, or whose punctuation alone changed, is in both.
        return cls(tuple((before - after).elements()), tuple((after - before).elements()))


def flaw_kind(chosen: str, rejected: str, *, rewritten_from: float = REWRITTEN_FROM) -> Kind:
    """The kind of flaw, by the first rule that holds; "other" where none does, and for equal texts."""
    if fold_whitespace(chosen) == fold_whitespace(rejected):
        return "other"
    if refuses(rejected) and not refuses(chosen):
        return "refusal"
    removed, added = Edit.between(chosen, rejected)
    if _any(added, _TOXIC - _plain_set(chosen)):
        return "toxic"
    if edit_share(chosen, rejected) > rewritten_from:
        return "rewritten"
    return _kind_of_words(removed, added)


def _kind_of_words(removed: tuple[str, ...], added: tuple[str, ...]) -> Kind:
    if any(map(_is_number, added)) or (any(map(_is_number, removed)) and added):
        return "number"
    if _any(removed, _NEGATIONS) != _any(added, _NEGATIONS):
        return "factual"
    lost, gained = _content(removed), _content(added)
    if lost and len(added) < len(removed) and not gained and not _any(added, _HEDGES | _TONE):
        return "omission"
    if _any(added, _HEDGES) and not _any(removed, _HEDGES):
        return "over-qualified"
    if _any(added, _TONE) or (_any(removed, _TONE) and not gained):
        return "tone"
    if set(map(_stem, gained)) - set(map(_stem, lost)):
        return "factual"
    return "other"


def _content(words: Iterable[str]) -> list[str]:
    return [word for word in words if word not in _EMPTY]


def _plain(text: str) -> list[str]:
    return [word for piece in text.lower().replace("’", "'").split() if (word := _bare(piece))]


def _plain_set(text: str) -> frozenset[str]:
    return frozenset(_plain(text))


def _bare(word: str) -> str:
    # A minus sign belongs to its number.
    return re.sub(r"^(?:(?!-\d)\W)+|\W+$", "", word)


def _is_number(word: str) -> bool:
    return any(c.isdigit() for c in word) or word in _NUMBERS


def _any(words: Iterable[str], listed: frozenset[str]) -> bool:
    return any(word in listed for word in words)


def _stem(word: str) -> str:
    """What forms of a word have in common: "gases" and "gas", "linked" and "linking"."""
    return re.sub(r"(?:'s|ies|es|s|ed|ing|ly|y|e|d)$", "", word)
