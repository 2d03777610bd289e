"""A minimal flaw without prompting: one word of an answer is replaced by one that the policy finds less likely.

The rest stays verbatim, so even a weak model yields a pair that differs in a single word (`flaw: infill` of
AROP; our addition to the paper's prompted flaw).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from prefloop.generate.completion import token_starts
from prefloop.generate.engine import Engine
from prefloop.records import Request, Response, Sampling, Scored, derive_seed

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_FUNCTION_WORDS = frozenset(
    "a an the and or but if then than so of to in on at by for with from as is are was were be been "
    "it its this that these those i you he she we they my your his her our their".split()
)
# Alternatives with a probability below e^-7 are noise.
_MIN_LOGPROB = -7.0
_ALTERNATIVES = 16
_MAX_WORD_TOKENS = 5
_WORD_ENDS = (" ", ".", ",", "\n")
"""Texts after which the rest of a continuation is not read: most words end at their first token, not at their fifth."""
_TRIES = 3


class Infill(NamedTuple):
    """A flawed copy of an answer."""

    text: str
    start: int
    """Index of the replaced word's first character, in both texts."""
    original: str
    replacement: str


class _Replacement(NamedTuple):
    start: int
    end: int
    first_token: str
    """First token of the replacement, as text."""
    logprob: float


def _replacements(answer: str, scored: Scored) -> list[_Replacement]:
    """All replacements of words in an answer: first tokens of less likely words of the same kind."""
    replacements = []
    tokens = _tokens_at(answer, scored.offsets)
    for match in _content_words(answer):
        if match.start() not in tokens:
            continue
        token_index, space = tokens[match.start()]
        for text, logprob in zip(
            scored.top_texts[token_index], scored.top_logprobs[token_index], strict=True
        ):
            word = text.strip()
            if (
                _MIN_LOGPROB <= logprob < scored.logprobs[token_index]
                # Without its space the token would extend the word before.
                and text.startswith(space + word)
                and _WORD.fullmatch(word)
                and word.isdigit() == match.group()[0].isdigit()
                and word[0].isupper() == match.group()[0].isupper()
                and not match.group().lower().startswith(word.lower())
                and word.lower() not in _FUNCTION_WORDS
            ):
                replacements.append(_Replacement(match.start(), match.end(), word, logprob))
    return replacements


def _content_words(answer: str) -> list[re.Match[str]]:
    """The words that may be replaced."""
    return [m for m in _WORD.finditer(answer) if m.group().lower() not in _FUNCTION_WORDS]


def _tokens_at(answer: str, offsets: Sequence[tuple[int, int]]) -> dict[int, tuple[int, str]]:
    """Index of a token's first character -> index of the token, and the space before it."""
    tokens: dict[int, tuple[int, str]] = {}
    previous_end = 0
    starts = token_starts(answer, offsets)
    for index, (first_character, (_, end)) in enumerate(zip(starts, offsets, strict=True)):
        # A character may consist of several tokens; the first one counts.
        if first_character is not None and first_character not in tokens:
            tokens[first_character] = (index, answer[previous_end:first_character])
        previous_end = end
    return tokens


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
    texts = [answer.text for answer in answers]
    words = [{match.start() for match in _content_words(text)} for text in texts]
    scored = engine.score(requests, answers, top=_ALTERNATIVES, at=words)
    attempts_by_answer: list[list[_Replacement]] = []
    for number, (answer, score) in enumerate(zip(texts, scored, strict=True)):
        random_generator = random.Random(derive_seed(seed, "word", number))
        attempts_by_answer.append(_draw_attempts(_replacements(answer, score), random_generator))
    flaws: list[Infill | None] = [None] * len(answers)
    ends = {"max_new_tokens": _MAX_WORD_TOKENS, "stop": (*sampling.stop, *_WORD_ENDS)}
    word_sampling = sampling.model_copy(update=ends)
    for attempt in range(_TRIES):
        unfinished = [
            n
            for n, attempts in enumerate(attempts_by_answer)
            if flaws[n] is None and attempt < len(attempts)
        ]
        if not unfinished:
            break
        replacements = [attempts_by_answer[n][attempt] for n in unfinished]
        finished = engine.sample(
            [
                requests[n].model_copy(
                    update={"prefix": texts[n][: replacement.start] + replacement.first_token}
                )
                for n, replacement in zip(unfinished, replacements, strict=True)
            ],
            word_sampling,
            seed=derive_seed(seed, "finish", attempt),
            label="infill",
        )
        for n, replacement, continuation in zip(unfinished, replacements, finished, strict=True):
            flaws[n] = _splice(texts[n], replacement, continuation)
    return flaws


def _draw_attempts(
    replacements: list[_Replacement], random_generator: random.Random
) -> list[_Replacement]:
    """Up to `_TRIES` replacements of different words in random order, each drawn by its probability."""
    words = sorted({replacement.start for replacement in replacements})
    random_generator.shuffle(words)
    attempts = []
    for start in words[:_TRIES]:
        same_start = [replacement for replacement in replacements if replacement.start == start]
        attempts += random_generator.choices(
            same_start, weights=[math.exp(replacement.logprob) for replacement in same_start]
        )
    return attempts


def _splice(answer: str, choice: _Replacement, continuation: Response) -> Infill | None:
    """The answer with the finished word; None where that is too long or not a proper replacement."""
    rest = re.match(r"[^\W_]*", continuation.text)
    assert rest is not None
    original, replacement = answer[choice.start : choice.end], choice.first_token + rest.group()
    # Without a text the word had ended, whatever came after.
    cut_off = continuation.finish == "length" and continuation.text != ""
    unfinished = cut_off and rest.end() == len(continuation.text)
    if (
        unfinished
        or replacement.lower() in (original.lower(), *_FUNCTION_WORDS)
        or replacement.isdigit() != original.isdigit()
    ):
        return None
    text = answer[: choice.start] + replacement + answer[choice.end :]
    return Infill(text, choice.start, original, replacement)
