"""Between tokens and answers, for every engine that samples tokens: what was sampled stays what it was."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prefloop.records import Request, Response, Sampling, Scored

if TYPE_CHECKING:
    from prefloop.models.chat import Chat

_BROKEN = "\ufffd"
"""What a part of a character is decoded as."""
_LONGEST = 8
"""Tokens that share a character, at most; they are bytes."""


def completion_ids(chat: Chat, request: Request, answer: Response) -> list[int]:
    """The tokens to score for an answer: the sampled ones, else the text's in its conversation."""
    if answer.token_ids:
        return list(answer.token_ids)
    return chat.completion_ids(request.messages, answer.text, ended=answer.finish == "stop")


def sampled_response(
    chat: Chat,
    request: Request,
    sampling: Sampling,
    ids: Sequence[int],
    logprobs: Sequence[float],
) -> Response:
    """The response that sampled tokens are.

    An answer that one of `sampling.stop` ended is its tokens before that text and the end of turn; where the text
    begins in the middle of a token, nobody sampled the answer, and its tokens are its text's.
    """
    place, whole, reasoning = stop_place(chat, ids, sampling.stop), tuple(ids), ""
    if request.prefix:
        text = _before(_continuation(chat, ids), sampling.stop)
    else:
        text, reasoning = chat.split(ids)
        if place is not None:
            text, whole = _stopped(chat, request, sampling.stop, ids, place, text)
    return Response(
        text=text,
        token_ids=whole,
        reasoning=reasoning,
        mean_logprob=sum(logprobs) / len(logprobs),
        finish="length" if place is None and not chat.is_ended(ids) else "stop",
    )


def stop_place(chat: Chat, ids: Sequence[int], stop: Sequence[str]) -> int | None:
    """Where in the tokens' text the first stop text begins; None where there is none."""
    if not stop:
        return None
    text = chat.decode(ids)
    return min((place for place in map(text.find, stop) if place >= 0), default=None)


def _before(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=None)]


def _continuation(chat: Chat, ids: Sequence[int]) -> str:
    """What tokens say after other text. Some decoders drop the space before a text's first word."""
    first = chat.text_ids("x")
    said = ids[:-1] if chat.is_ended(ids) else ids
    return chat.decode([*first, *said])[len(chat.decode(first)) :]


def _stopped(
    chat: Chat,
    request: Request,
    stop: Sequence[str],
    ids: Sequence[int],
    place: int,
    answer: str,
) -> tuple[str, tuple[int, ...]]:
    """Text and tokens of an answer that a stop text ended, at a place of all that was decoded."""
    text = _before(answer, stop).strip()
    before = chat.decode(ids)[:place]
    for count in range(len(ids), -1, -1):
        if chat.decode(ids[:count]) == before:
            return text, (*ids[:count], *chat.end_ids)
    return text, tuple(chat.completion_ids(request.messages, text))


def scored_answer(
    chat: Chat,
    answer: Response,
    ids: Sequence[int],
    logprobs: Sequence[float],
    top_ids: Sequence[Sequence[int]] = (),
    top_logprobs: Sequence[Sequence[float]] = (),
) -> Scored:
    """What a model says of an answer's tokens."""
    return Scored(
        token_ids=tuple(ids),
        offsets=tuple(offsets(chat, ids, answer.text)),
        logprobs=tuple(logprobs),
        top_texts=_top_texts(chat, top_ids),
        top_logprobs=tuple(map(tuple, top_logprobs)),
    )


def _top_texts(chat: Chat, top_ids: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], ...]:
    """What each alternative says; a token that is one at several places is decoded once."""
    if not top_ids:
        return ()
    distinct = list({token for row in top_ids for token in row})
    texts = dict(zip(distinct, chat.token_texts(distinct), strict=True))
    return tuple(tuple(texts[token] for token in row) for row in top_ids)


def offsets(chat: Chat, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
    """Character span in `text` of each of the tokens that say it, among thoughts and end tokens perhaps."""
    plain = list(ids[:-1] if chat.is_ended(ids) else ids)
    if plain == chat.text_ids(text):
        spans = chat.text_offsets(text)
        return spans + [(len(text), len(text))] * (len(ids) - len(plain))
    ends = _ends(chat, ids)
    # What was thought, and the spaces that an answer's text lacks, come before the last place that says it.
    shift = max(0, chat.decode(ids).rfind(text))
    ends = [min(max(0, end - shift), len(text)) for end in ends]
    return list(zip([0, *ends], ends, strict=False))


def token_starts(text: str, spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """The first character of each token that is no space, by its span in `text`; None where there is none.

    Tokenizers differ in whether a token's span includes the space before it.
    """
    said = [text[start:end].lstrip() for start, end in spans]
    return [end - len(part) if part else None for part, (_, end) in zip(said, spans, strict=True)]


def places_at(chat: Chat, ids: Sequence[int], text: str, characters: Collection[int]) -> list[int]:
    """Which of the tokens that say `text` begin at one of its `characters`, spaces aside."""
    starts = token_starts(text, offsets(chat, ids, text))
    return [place for place, start in enumerate(starts) if start in characters]


def _ends(chat: Chat, ids: Sequence[int]) -> list[int]:
    """Length of what is decoded up to the end of each token."""
    whole = chat.decode(ids)
    texts = _token_texts(chat, ids)
    said = "".join(texts)
    if said.endswith(whole):
        # Some decoders drop the space before a text's first word.
        dropped = len(said) - len(whole)
        return [max(0, end - dropped) for end in accumulate(map(len, texts))]
    # Beginning by beginning, whose last character, where it is cut, may be decoded as several.
    ends = [len(chat.decode(ids[: n + 1])) for n in range(len(ids))]
    return list(accumulate(reversed(ends), min))[::-1]


def _token_texts(chat: Chat, ids: Sequence[int]) -> list[str]:
    """What each token says, special ones nothing; a character of several tokens is said by the first of them."""
    special = set(chat.tokenizer.all_special_ids)
    pairs = zip(ids, chat.token_texts(ids), strict=True)
    texts = ["" if token in special else text for token, text in pairs]
    for n, text in enumerate(texts):
        if _BROKEN not in text:
            continue
        for size in range(2, _LONGEST + 1):
            if _BROKEN not in (joined := _continuation(chat, ids[n : n + size])):
                texts[n : n + size] = [joined, *[""] * (len(ids[n : n + size]) - 1)]
                break
    return texts
