"""Small functions that read one format each: single answers, pairs of answers, ranked answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from prefloop.data.cells import (
    ANSWERS,
    PROMPTS,
    TALKS,
    Cells,
    Entry,
    RowContent,
    context,
    is_texts,
    is_transcript,
    is_turns,
    joined,
    same,
    talk,
    transcript,
)
from prefloop.data.rows import conversation, filled_text
from prefloop.records import Message

# Single answers.


def _answer(cells: Cells, name: str) -> str:
    """A column with an answer: a text, a turn of the assistant, or a conversation that ends with it."""
    value = cells.get(name)
    if not is_turns(cells, name) or value == [] or is_texts(value):
        return filled_text(cells.where, name, value)
    turns = talk(cells, name, answer_only=True)
    if turns[-1].role != "assistant":
        raise cells.fail(f"{name!r} ends with the user's turn; end it with the assistant's answer")
    return turns[-1].content


def _single(cells: Cells, turns: list[Message], answers: Sequence[str] = ANSWERS) -> RowContent:
    """A conversation with or without its answer, which is its own last turn or stands in a column."""
    target = None
    if turns and turns[-1].role == "assistant":
        target = turns.pop().content
    else:
        name = next((name for name in answers if cells.row.get(name) is not None), None)
        target = _answer(cells, name) if name else None
    if not turns or turns[-1].role != "user":
        raise cells.fail("there is no user's turn before the answer; add it")
    return _labelled(cells, Entry(tuple(turns), target=target))


def _labelled(cells: Cells, entry: Entry) -> RowContent:
    """The entry, minding a column that says whether its answer is a good one."""
    name = cells.first("kto_tag", "label")
    if name is None or entry.target is None:
        return [entry]
    label = _truth(cells.get(name))
    if label is None:
        raise cells.fail(
            f"{name!r} is {str(cells.row[name])[:30]!r}, and with an answer it must be true (a good answer) or false; "
            f"convert it, or pass it over with data.ignore: [{name}]"
        )
    if label:
        return [replace(entry, label=True)]
    return [
        replace(entry, label=False, target=None, rejected=entry.target, flaw=f"{name} is false")
    ]


def _truth(value: object) -> bool | None:
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    return known.get(str(value).strip().lower())


def messages(cells: Cells) -> RowContent:
    """A column of turns, the last of which may be the answer."""
    given = (name for name in TALKS if cells.row.get(name) is not None)
    name = cells.first(*TALKS) or next(given)
    return _single(cells, joined(cells, context(cells, ()), talk(cells, name)))


def asks(prompt: str, answers: Sequence[str]) -> Callable[[Cells], RowContent]:
    """A reader of a prompt's column and the columns that may hold its answer."""
    return lambda cells: _single(cells, context(cells, (prompt,)), answers)


def dialogue(cells: Cells) -> RowContent:
    """Texts of user and assistant in turn."""
    said = cells.get("data") or cells.get("dialog")
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    return _single(cells, conversation(cells.where, "data", turns))


def questions(cells: Cells) -> RowContent:
    """The first of several questions: what follows would need its answer."""
    first, *_ = cells.get("turns")
    return [Entry((Message(role="user", content=filled_text(cells.where, "turns[0]", first)),))]


def transcript_text(cells: Cells) -> RowContent:
    """A column `text` with a transcript."""
    return _single(cells, transcript(cells.text("text")))


# Pairs of answers.


def pair(cells: Cells, good: str = "chosen", bad: str = "rejected") -> RowContent:
    """Two answers, each a text, a turn or a conversation, to a prompt in a column or in both of them."""
    sides = [_side(cells, name) for name in (good, bad)]
    leads = [lead for lead, _ in sides if lead]
    if len(leads) == 2 and leads[0] != leads[1]:
        return "the histories of the two answers differ"
    messages = _before(cells, leads[0] if leads else [], good)
    return [_decided(cells, messages, sides[0][1], sides[1][1])]


def _side(cells: Cells, name: str) -> tuple[list[Message], str]:
    """What comes before an answer in its own column, and the answer."""
    value = cells.get(name)
    written = isinstance(value, str) and not is_turns(cells, name)
    if written and not is_transcript(value):
        if value.encode(errors="ignore").decode() != value:
            raise cells.fail(f"{name!r} holds half of a surrogate pair; remove it")
        return [], value
    if written:
        turns = transcript(value)
    elif is_turns(cells, name):
        turns = talk(cells, name, answer_only=True)
    else:
        kind = "empty" if value is None else f"{type(value).__name__}, not text"
        raise cells.fail(f"{name!r} is {kind}; {'fill' if value is None else 'convert'} it")
    if turns[-1].role != "assistant":
        if written:
            return turns, ""  # a transcript that waits for its answer
        raise cells.fail(f"{name!r} ends with the user's turn; end it with the assistant's answer")
    return turns[:-1], turns[-1].content


def _before(cells: Cells, lead: list[Message], good: str) -> list[Message]:
    """The turns before the answers, from the prompt's columns and from the answers' own conversations."""
    question = _prompt_of_pair(cells, good)
    if not question or (len(question) == 1 and question[0].role == "system"):
        if not lead or lead[0].role == "assistant":
            raise cells.fail(
                "has neither 'prompt' nor 'messages'; name the prompt's column in data.prompt_field, or let 'chosen' and 'rejected' be "
                "conversations that differ in their last turn only"
            )
        return joined(cells, question, lead)
    if question[-1].role != "user":
        raise cells.fail("the prompt ends with the assistant's turn; leave it to the two answers")
    if not lead:
        return question
    if lead[0].role == "assistant":
        return [*question, *lead]
    return _agreed(cells, question, lead, good)


def _prompt_of_pair(cells: Cells, good: str) -> list[Message]:
    name = cells.first(*TALKS)
    if name is None:
        return context(cells)
    turns = talk(cells, name)
    if turns[-1].role == "user":
        return joined(cells, context(cells, ()), turns)
    # Published sets repeat the prompt with its chosen answer: UltraFeedback's `messages`.
    if cells.first(*PROMPTS):
        del cells.used[name]
        return context(cells)
    answer = cells.row[good]
    if not isinstance(answer, str):
        del cells.used[name]
        return context(cells, ())
    if not same(turns[-1].content, answer):
        raise cells.fail(f"{name!r} ends with the assistant's turn; leave it to the two answers")
    return joined(cells, context(cells, ()), turns[:-1])


def _agreed(cells: Cells, question: list[Message], lead: list[Message], good: str) -> list[Message]:
    """The longer one of a prompt and a history, which must not contradict each other."""
    system = [turn for turn in question if turn.role == "system"]
    own = [turn for turn in question if turn.role != "system"]
    users = [turn.content for turn in lead if turn.role == "user"]
    within = len(own) == 1 and any(same(own[0].content, text) for text in users)
    bare = [turn for turn in lead if turn.role != "system"]
    begins = len(own) <= len(bare) and all(
        a.role == b.role and same(a.content, b.content) for a, b in zip(own, bare, strict=False)
    )
    if not within and not begins:
        raise cells.fail(
            f"the prompt is not in the conversation of {good!r}; correct one of them, or pass the prompt's "
            "column over with data.ignore"
        )
    return joined(cells, system, lead)


def _decided(
    cells: Cells, messages: Sequence[Message], chosen: str, rejected: str, *, tie: bool = False
) -> Entry:
    """A pair with its target: the data's own one, else the better answer."""
    name = cells.first("response", "completion", "target")
    own = _answer(cells, name) if name else None
    flaw = ""
    if not chosen.strip() or not rejected.strip():
        flaw = "empty answer"
    elif chosen == rejected:
        flaw = "identical answers"
    tied = tie or _truth(cells.get("tie")) is True
    best = None if tied or not chosen.strip() else chosen
    return Entry(
        tuple(messages),
        target=own if own is not None else best,
        chosen=chosen,
        rejected=rejected,
        tie=tied,
        flaw=flaw,
    )


def implicit(cells: Cells) -> RowContent:
    """TRL's implicit prompt: the words that both texts begin with."""
    chosen, rejected = cells.text("chosen"), cells.text("rejected")
    equal = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    shared = "".join(character for character, _ in equal)
    shared = shared[: max(map(shared.rfind, " \n\t")) + 1]
    if not shared.strip():
        raise cells.fail(
            "has neither 'prompt' nor 'messages', and 'chosen' and 'rejected' do not begin with the same "
            "words; name the prompt's column in data.prompt_field, or let them be conversations that differ in their "
            "last turn only"
        )
    messages = [*context(cells, ()), Message(role="user", content=shared.strip())]
    # The words after the prompt, without the space that stood between.
    return [
        _decided(cells, messages, chosen[len(shared) :].strip(), rejected[len(shared) :].strip())
    ]


def openai(cells: Cells) -> RowContent:
    """OpenAI's preference form: the prompt is inside `input`."""
    given = cells.get("input")
    if given.get("tools"):
        raise cells.fail("'input.tools' is not read; remove rows with tools, or convert them")
    cells = Cells(cells.where, {"prompt": given["messages"], **cells.row}, cells.used)
    return pair(cells, "preferred_output", "non_preferred_output")


def two(first: str, second: str, *labels: str) -> Callable[[Cells], RowContent]:
    """A reader of two answers beside a column that says which one is better."""

    def read(cells: Cells) -> RowContent:
        sides = [_side(cells, name) for name in (first, second)]
        if sides[0][0] != sides[1][0]:
            return "the histories of the two answers differ"
        question = context(cells, ("context", *PROMPTS, "history"))
        messages = sides[0][0] if sides[0][0] and not question else question
        if not messages:
            messages = _before(cells, [], first)
        name = cells.first(*labels)
        if name is None:
            raise cells.fail(
                f"has no {' or '.join(map(repr, labels))} that says which answer is better; add it"
            )
        label = _LABELS[name](cells, name)
        if label is None:
            return [Entry(tuple(messages), flaw="no majority")]
        answers = [answer for _, answer in sides]
        if label == 2:
            answers.reverse()
        return [_decided(cells, messages, *answers, tie=label == 0)]

    return read


def _votes(cells: Cells, name: str) -> int | None:
    """What most annotators said; None where there is no such label."""
    votes = cells.get(name)
    if not isinstance(votes, list) or not votes or any(vote not in (0, 1, 2) for vote in votes):
        raise cells.fail("'annotators' must be a filled list of 0 (tie), 1 and 2")
    ranked = Counter(votes).most_common(2)
    return None if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else int(ranked[0][0])


def _number(cells: Cells, name: str) -> float:
    value = cells.get(name)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise cells.fail(f"{name!r} is {str(value)[:30]!r}, no number; correct it") from None


def _known(meanings: Mapping[str, int]) -> Callable[[Cells, str], int]:
    """A reader of a label with known words: 1 and 2 name the better answer, 0 is a tie."""

    def read(cells: Cells, name: str) -> int:
        value = str(cells.get(name)).strip().lower()
        if value not in meanings:
            raise cells.fail(
                f"{name!r} is {value[:30]!r}, none of {', '.join(meanings)}; correct it"
            )
        return meanings[value]

    return read


def _stronger(cells: Cells, name: str) -> int:
    """A strength of preference: below zero for the first answer, above for the second."""
    value = _number(cells, name)
    return 0 if value == 0 else 1 if value < 0 else 2


_ONE_TWO = {"1": 1, "2": 2, "0": 0, "1.0": 1, "2.0": 2, "0.0": 0, "1.5": 0}
_LABELS: Mapping[str, Callable[[Cells, str], int | None]] = {
    "annotators": _votes,
    "preference": _known(_ONE_TWO),
    "gpt4_preference": _known(_ONE_TWO),
    "preference_strength": _stronger,
    "overall_preference": _stronger,
    "better_response_id": _known({"0": 1, "1": 2}),
    "labels": _known({"1": 1, "0": 2}),
    "winner": _known({"model_a": 1, "model_b": 2, "tie": 0, "tie (bothbad)": 0, "a": 1, "b": 2}),
}


def ranked(column: str, text: str, *scores: tuple[str, int]) -> Callable[[Cells], RowContent]:
    """A reader of several answers with a score each (1: higher is better, -1: lower): best over worst."""

    def read(cells: Cells) -> RowContent:
        messages = context(cells, ("prompt", "instruction"))
        if not messages:
            raise cells.fail("has no 'prompt' or 'instruction'; add it")
        scored = []
        for number, one in enumerate(cells.get(column)):
            name = f"{column}[{number}]"
            key, sign = next(((k, s) for k, s in scores if one.get(k) is not None), ("", 0))
            inside = Cells(cells.where, {name: one.get(text), f"{name}.{key}": one.get(key)})
            if not sign:
                raise cells.fail(f"{name} has no {' or '.join(k for k, _ in scores)}; add it")
            scored.append((sign * _number(inside, f"{name}.{key}"), inside.text(name)))
        best, worst = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
        if best[0] == worst[0]:
            return [Entry(tuple(messages), flaw="all answers are ranked alike")]
        return [_decided(cells, messages, best[1], worst[1])]

    return read


def many(cells: Cells) -> RowContent:
    """RewardBench 2's lists of good and of bad answers: every good one over every bad one."""
    messages = context(cells)
    if not messages:
        raise cells.fail("has no 'prompt'; add it")
    good, bad = cells.get("chosen"), cells.get("rejected")
    return [
        replace(_decided(cells, messages, one, other), suffix=f"-{i}-{j}")
        for i, one in enumerate(good, start=1)
        for j, other in enumerate(bad, start=1)
    ]
