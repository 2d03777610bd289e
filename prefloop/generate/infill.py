"""A minimal flaw without asking for one: one word of an answer replaced by what the policy finds less likely.

The rest stays verbatim, so even a weak model makes a pair that differs in a single place (`flaw: infill`
of AROP; our addition beside the paper's prompted flaw).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from prefloop.generate.engine import Engine
from prefloop.records import Request, Response, Sampling, Scored, derive_seed

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_FUNCTION_WORDS = frozenset(
    "a an the and or but if then than so of to in on at by for with from as is are was were be been "
    "it its this that these those i you he she we they my your his her our their".split()
)
# Alternatives below e^-7 are noise rather than something the policy might say.
_FLOOR = -7.0
_ALTERNATIVES = 16
_MAX_WORD_TOKENS = 5
_TRIES = 3


class Infill(NamedTuple):
    """A flawed copy of an answer."""

    text: str
    start: int
    """Character at which the replaced word begins, in both texts."""
    original: str
    replacement: str


class _Option(NamedTuple):
    start: int
    end: int
    begins: str
    """First token of the replacement, as text."""
    logprob: float


def _options(answer: str, scored: Scored) -> list[_Option]:
    """Every (word, first token of a less likely word of the same kind) of an answer."""
    found = []
    tokens = _tokens_at(answer, scored.offsets)
    for match in _WORD.finditer(answer):
        if match.start() not in tokens or match.group().lower() in _FUNCTION_WORDS:
            continue
        place, space = tokens[match.start()]
        for text, logprob in zip(scored.top_texts[place], scored.top_logprobs[place], strict=True):
            word = text.strip()
            if (
                _FLOOR <= logprob < scored.logprobs[place]
                # Without the space it would lengthen the word before instead of replacing this one.
                and text.startswith(space + word)
                and _WORD.fullmatch(word)
                and word.isdigit() == match.group()[0].isdigit()
                and word[0].isupper() == match.group()[0].isupper()
                and not match.group().lower().startswith(word.lower())
                and word.lower() not in _FUNCTION_WORDS
            ):
                found.append(_Option(match.start(), match.end(), word, logprob))
    return found


def _tokens_at(answer: str, offsets: Sequence[tuple[int, int]]) -> dict[int, tuple[int, str]]:
    """By the character at which it begins: the token's number, and the space that belongs to it.

    Tokenizers differ in whether a token's span includes the space before it.
    """
    found: dict[int, tuple[int, str]] = {}
    before = 0
    for number, (start, end) in enumerate(offsets):
        text = answer[start:end].lstrip()
        begins = end - len(text)
        # A character of several tokens begins with the first of them.
        if text and begins not in found:
            found[begins] = (number, answer[before:begins])
        before = end
    return found


def infill_flaws(
    engine: Engine,
    requests: Sequence[Request],
    answers: Sequence[Response],
    sampling: Sampling,
    *,
    seed: int,
) -> list[Infill | None]:
    """One flawed copy per answer; None where no word has a plausible, less likely alternative.

    The word is drawn by `seed` among those with alternatives, then the alternative by its probability;
    a replacement of several tokens is finished by sampling from the policy up to the word's end.
    """
    scored = engine.score(requests, answers, top=_ALTERNATIVES)
    texts = [answer.text for answer in answers]
    plans: list[list[_Option]] = []
    for number, (answer, score) in enumerate(zip(texts, scored, strict=True)):
        draw = random.Random(derive_seed(seed, "word", number))
        plans.append(_draw_plan(_options(answer, score), draw))
    flaws: list[Infill | None] = [None] * len(answers)
    for attempt in range(_TRIES):
        todo = [n for n, plan in enumerate(plans) if flaws[n] is None and attempt < len(plan)]
        if not todo:
            break
        chosen = [plans[n][attempt] for n in todo]
        finished = engine.sample(
            [
                requests[n].model_copy(update={"prefix": texts[n][: option.start] + option.begins})
                for n, option in zip(todo, chosen, strict=True)
            ],
            sampling.model_copy(update={"max_new_tokens": _MAX_WORD_TOKENS}),
            seed=derive_seed(seed, "finish", attempt),
            label="infill",
        )
        for n, option, rest in zip(todo, chosen, finished, strict=True):
            flaws[n] = _splice(texts[n], option, rest)
    return flaws


def _draw_plan(options: list[_Option], draw: random.Random) -> list[_Option]:
    """Up to `_TRIES` options: words in random order, at each the alternative drawn by its probability."""
    words = sorted({option.start for option in options})
    draw.shuffle(words)
    plan = []
    for start in words[:_TRIES]:
        same_start = [option for option in options if option.start == start]
        plan += draw.choices(
            same_start, weights=[math.exp(option.logprob) for option in same_start]
        )
    return plan


def _splice(answer: str, option: _Option, continuation: Response) -> Infill | None:
    """Put the finished word in; None when it ran past the word limit or came out as none that fits."""
    rest = re.match(r"[^\W_]*", continuation.text)
    assert rest is not None
    original, replacement = answer[option.start : option.end], option.begins + rest.group()
    unfinished = continuation.finish == "length" and rest.end() == len(continuation.text)
    if (
        unfinished
        or replacement.lower() in (original.lower(), *_FUNCTION_WORDS)
        or replacement.isdigit() != original.isdigit()
    ):
        return None
    text = answer[: option.start] + replacement + answer[option.end :]
    return Infill(text, option.start, original, replacement)
