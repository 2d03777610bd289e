"""Pairs of answers with what people, or a stronger model, said about them: read, checked, split by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from pydantic import Field

from prefloop.data.rows import Row, conversation, filled_text, open_rows
from prefloop.errors import DataError
from prefloop.records import Message, Prompt, Record

ANSWERS = (("chosen", "rejected"), ("response_1", "response_2"))
"""The columns that hold a labelled pair's answers."""


class Preference(Record):
    """Two answers to one conversation, and which one is better."""

    id: str
    source: str
    """The data set: the file's stem, or what the row's own field `source` says."""
    messages: tuple[Message, ...] = Field(min_length=1)
    chosen: str
    """The better answer; of a tie, the first one in the row."""
    rejected: str
    tie: bool = False
    """Whether most labels say that neither is better."""
    margin: float = 0.0
    """By how much the scores should differ, where the data say so."""
    target: str | None = None
    """A reference answer, for judges that compare with one."""

    @property
    def prompt(self) -> Prompt:
        """The conversation as judges take it."""
        return Prompt(id=self.id, messages=self.messages, target=self.target)

    @property
    def key(self) -> str:
        """Equal for equal conversations: what a split must not divide."""
        turns = "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in self.messages)
        return sha256(turns.encode("utf-8", "surrogatepass")).hexdigest()


class LabelledPairs(Record):
    """What a file held, and what of it cannot be used."""

    pairs: tuple[Preference, ...]
    dropped: dict[str, int]
    """Reason -> rows."""


def read_preferences(
    source: str, *, margin_field: str | None = None, split: str = "train"
) -> LabelledPairs:
    """All labelled pairs of a file, folder or Hub data set. Raises DataError with the bad row's place.

    A row has `prompt` or `messages`, and `chosen` and `rejected`; or `response_1` and `response_2` with
    `annotators`, labels of which 1 and 2 name the better answer and 0 is a tie. The label that most
    annotators gave counts; rows without such a label, and rows with an empty answer, are dropped and
    counted. `chosen` and `rejected` may be whole conversations (TRL's form); the last turns count.
    """
    stem, rows = open_rows(source, "train", None, split)
    dropped: Counter[str] = Counter()
    pairs = []
    for number, (where, row) in enumerate(rows, start=1):
        found = preference(where, row, f"{stem}-{number}", Path(stem).name, margin_field)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            pairs.append(found)
    if not pairs:
        raise DataError(
            f"{source} holds no labelled pairs; give rows with prompt, chosen and rejected"
        )
    return LabelledPairs(pairs=tuple(pairs), dropped=dict(dropped))


def split_by_prompt(
    pairs: Sequence[Preference], share: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Training and held-out pairs; all pairs of one conversation are on the same side.

    A side depends on the conversation and the seed alone, so that pairs which are added later, or to
    another file, move no other pair.
    """
    train: list[Preference] = []
    held_out: list[Preference] = []
    for pair in pairs:
        digest = sha256(f"{seed}/{pair.key}".encode()).digest()
        place = int.from_bytes(digest[:8]) / 2**64
        (held_out if place < share else train).append(pair)
    return train, held_out


def preference(
    where: str, row: Row, default_id: str, source: str, margin_field: str | None
) -> Preference | str:
    """The row's pair, or why it has none. Raises DataError with `where` for a malformed row."""
    names = next((names for names in ANSWERS if all(n in row for n in names)), None)
    if names is None:
        found = ", ".join(repr(str(name)[:40]) for name in row) or "none"
        raise DataError(
            f"{where} has neither 'chosen' and 'rejected' nor 'response_1' and 'response_2' (its "
            f"columns: {found}); rename the columns with the two answers"
        )
    messages, answers = _conversation_and_answers(where, row, names)
    if not all(answer.strip() for answer in answers):
        return "empty answer"
    label = _label(where, row["annotators"]) if "annotators" in row else 1
    if label is None:
        return "no majority"
    if label == 2:
        answers.reverse()
    if answers[0] == answers[1]:
        return "identical answers"
    target = row.get("target")
    return Preference(
        id=str(row.get("id") or default_id),
        source=str(row.get("source") or source),
        messages=tuple(messages),
        chosen=answers[0],
        rejected=answers[1],
        tie=label == 0 or row.get("tie") is True,
        margin=_margin(where, row, margin_field),
        target=None if target is None else filled_text(where, "target", target),
    )


def _conversation_and_answers(
    where: str, row: Row, names: tuple[str, str]
) -> tuple[list[Message], list[str]]:
    answers: list[str] = []
    leads: list[list[Message]] = []
    for name in names:
        value = row[name]
        if isinstance(value, list):
            turns = conversation(where, name, value, answer_only=_has_prompt(row))
            leads.append(turns[:-1])
            answers.append(turns[-1].content)
        elif isinstance(value, str):
            answers.append(value)
        else:
            raise DataError(f"{where}: {name!r} is {type(value).__name__}, not text; convert it")
    if _has_prompt(row):
        return _prompt_turns(where, row, answers), answers
    if len(leads) == 2 and leads[0] and leads[0] == leads[1]:
        return leads[0], answers
    raise DataError(
        f"{where} has neither 'prompt' nor 'messages'; add one, or let 'chosen' and 'rejected' be "
        "conversations that differ in their last turn only"
    )


def _has_prompt(row: Row) -> bool:
    return row.get("prompt") is not None or row.get("messages") is not None


def _prompt_turns(where: str, row: Row, answers: Sequence[str]) -> list[Message]:
    given = row.get("messages")
    field = "messages" if given is not None else "prompt"
    if given is None:
        given = row["prompt"]
    if not isinstance(given, list):
        return [Message(role="user", content=filled_text(where, field, given))]
    turns = conversation(where, field, given)
    if turns[-1].role == "assistant" and turns[-1].content in answers:
        # UltraFeedback's `messages` is the prompt with the chosen answer.
        turns = turns[:-1]
    if turns[-1].role != "user":
        raise DataError(
            f"{where}: {field!r} ends with the assistant's turn; leave it to the two answers"
        )
    return turns


def _label(where: str, votes: object) -> int | None:
    """What most annotators said; None where there is no such label."""
    if not isinstance(votes, list) or not votes or not set(votes) <= {0, 1, 2}:
        raise DataError(f"{where}: 'annotators' must be a filled list of 0 (tie), 1 and 2")
    ranked = Counter(votes).most_common(2)
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        return None
    return int(ranked[0][0])


def _margin(where: str, row: Row, field: str | None) -> float:
    if field is None:
        return 0.0
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(
            f"{where}: {field!r} is no number; correct it, or leave data.margin_field out"
        )
    return float(value)


def counts(reasons: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The sum of several counts by reason."""
    total: Counter[str] = Counter()
    for one in reasons:
        total.update(one)
    return dict(total)


def sources(pairs: Sequence[Preference]) -> Iterator[tuple[str, list[Preference]]]:
    """The pairs of each data set, in the order in which the data sets come."""
    for name in dict.fromkeys(pair.source for pair in pairs):
        yield name, [pair for pair in pairs if pair.source == name]
