"""What a row of data means: one table of formats, each found by its columns and read by one small function.

Every column of a row is read, ignored by name, or refused: a reader notes the columns that it looks at, and
of the others those that hold a conversation, an answer or a label must say nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, field_validator

from prefloop.config import Options
from prefloop.data import readers
from prefloop.data.cells import (
    ANSWERS,
    PROMPTS,
    SYSTEM,
    TALKS,
    Cells,
    NoTurns,
    RowContent,
    empty,
    is_objects,
    is_texts,
    is_transcript,
)
from prefloop.data.files import Row, TextRow
from prefloop.errors import DataError, nearest
from prefloop.records import as_tuple


class FieldOptions(Options):
    """How the columns of a source are read, where their names do not say it."""

    format: str | None = None
    """How rows are read, by the name of docs/data.md's table; null: found by the columns, and said."""
    prompt_field: str = "prompt"
    """Column with the prompt: a text, or a list of {role, content} turns."""
    input_field: str | None = None
    """Column with material that is put below the prompt after a blank line ("input" in Alpaca's format)."""
    response_field: str | None = "response"
    """Column with the target response; null ignores responses."""
    messages_field: str | None = "messages"
    """Column with a whole conversation of {role, content} turns, whose last assistant turn is the target; null ignores it."""
    chosen_field: str = "chosen"
    """Column with the better answer of a labelled pair: a text, a turn, or a conversation."""
    rejected_field: str = "rejected"
    """Column with the worse answer."""
    system_field: str = "system"
    """Column with a text that becomes the system turn."""
    id_field: str | None = "id"
    """Column with unique ids; rows without one are numbered. null numbers all rows."""
    ignore: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Columns to pass over, such as ones that are refused otherwise."""

    @field_validator("format")
    @classmethod
    def _is_there(cls, name: str | None) -> str | None:
        if name is not None and name not in BY_NAME:
            raise ValueError(f"data.format: no format {name!r}; {nearest(name, list(BY_NAME))}")
        return name


# The table.


class Format(NamedTuple):
    """One way in which rows are written."""

    name: str
    about: str
    fits: Callable[[Cells], bool]
    read: Callable[[Cells], RowContent]
    pairs: bool = False
    """Whether its rows are labelled pairs."""


def _has(*names: str) -> Callable[[Cells], bool]:
    return lambda cells: all(name in cells.row for name in names)


def _any(*names: str) -> Callable[[Cells], bool]:
    return lambda cells: cells.first(*names) is not None


def _both(cells: Cells) -> bool:
    return "chosen" in cells.row and "rejected" in cells.row


def _prompted(cells: Cells) -> bool:
    return any(cells.row.get(name) is not None for name in (*TALKS, *PROMPTS))


FORMATS: tuple[Format, ...] = (
    Format(
        "openai_preference",
        "OpenAI's preference fine-tuning: input.messages, preferred_output, non_preferred_output",
        lambda c: (
            isinstance(given := c.row.get("input"), Mapping)
            and "messages" in given
            and "preferred_output" in c.row
        ),
        readers.openai,
        True,
    ),
    Format(
        "ultrafeedback_raw",
        "completions with a score each; the best over the worst by fine-grained_score, else overall_score",
        lambda c: is_objects(c.row.get("completions"), "response"),
        readers.ranked("completions", "response", ("fine-grained_score", 1), ("overall_score", 1)),
        True,
    ),
    Format(
        "nectar",
        "answers with a rank each; the first over the last",
        lambda c: is_objects(c.row.get("answers"), "answer", "rank"),
        readers.ranked("answers", "answer", ("rank", -1)),
        True,
    ),
    Format(
        "answer_lists",
        "RewardBench 2's lists of texts in chosen and rejected; every good one over every bad one",
        lambda c: is_texts(c.row.get("chosen")) and is_texts(c.row.get("rejected")),
        readers.many,
        True,
    ),
    Format(
        "spin",
        "SPIN's real and generated conversations",
        _has("real", "generated"),
        lambda cells: readers.pair(cells, "real", "generated"),
        True,
    ),
    Format(
        "two_responses",
        "response_1 and response_2 with annotators, preference or preference_strength",
        _has("response_1", "response_2"),
        readers.two("response_1", "response_2", "annotators", "preference_strength", "preference"),
        True,
    ),
    Format(
        "helpsteer3",
        "context, response1 and response2 with overall_preference",
        _has("response1", "response2"),
        readers.two("response1", "response2", "overall_preference"),
        True,
    ),
    Format(
        "safe_rlhf",
        "response_0 and response_1 with better_response_id",
        _has("response_0", "response_1"),
        readers.two("response_0", "response_1", "better_response_id"),
        True,
    ),
    Format(
        "alpaca_eval",
        "output_1 and output_2 with preference",
        _has("output_1", "output_2"),
        readers.two("output_1", "output_2", "preference", "gpt4_preference"),
        True,
    ),
    Format(
        "arena",
        "Chatbot Arena's conversation_a and conversation_b with winner",
        _has("conversation_a", "conversation_b"),
        readers.two("conversation_a", "conversation_b", "winner"),
        True,
    ),
    Format(
        "shp",
        "Stanford's SHP: history (a post), human_ref_A and human_ref_B with labels",
        _has("human_ref_A", "human_ref_B"),
        readers.two("human_ref_A", "human_ref_B", "labels"),
        True,
    ),
    Format(
        "stack_exchange_paired",
        "question, response_j (better) and response_k",
        _has("response_j", "response_k"),
        lambda cells: readers.pair(cells, "response_j", "response_k"),
        True,
    ),
    Format(
        "implicit_prompt",
        "TRL's chosen and rejected as texts without a prompt, which is the words they both begin with",
        lambda c: (
            _both(c)
            and not _prompted(c)
            and all(
                isinstance(c.row[n], str) and not is_transcript(c.row[n])
                for n in ("chosen", "rejected")
            )
        ),
        readers.implicit,
        True,
    ),
    Format(
        "pairs",
        "chosen and rejected (texts, turns, conversations or HH-RLHF's transcripts) with a prompt's columns",
        _both,
        readers.pair,
        True,
    ),
    Format(
        "messages",
        "messages, conversations or conversation: turns {role, content} or ShareGPT's {from, value}",
        lambda c: (
            c.first(*TALKS) is not None
            or (any(c.row.get(name) is not None for name in TALKS) and not c.first(*PROMPTS))
        ),
        readers.messages,
    ),
    Format(
        "transcript",
        'text with "\\n\\nHuman:" or "### Human:" before each turn',
        lambda c: is_transcript(c.row.get("text")) and not _prompted(c),
        readers.transcript_text,
    ),
    Format(
        "dialogue",
        "UltraChat's data: texts of user and assistant in turn",
        lambda c: is_texts(c.row.get("data")) or is_texts(c.row.get("dialog")),
        readers.dialogue,
    ),
    Format(
        "mt_bench",
        "turns: questions, of which the first is asked and the others are left out",
        lambda c: is_texts(c.row.get("turns")) and not _prompted(c),
        readers.questions,
    ),
    Format(
        "prompt_response",
        "prompt (text or turns) with response, completion, answer, output or target, or without",
        _any("prompt"),
        readers.asks("prompt", ANSWERS),
    ),
    Format(
        "alpaca",
        "instruction with input or context, history, system; output or response",
        _any("instruction"),
        readers.asks("instruction", ("output", "response", "completion", "answer")),
    ),
    Format(
        "question_answer",
        "question with system or system_prompt; response or answer",
        _any("question"),
        readers.asks("question", ("response", "answer", "output", "completion")),
    ),
    Format(
        "query_response",
        "query and response",
        _any("query"),
        readers.asks("query", ("response", "answer", "output")),
    ),
    Format(
        "problem_solution",
        "problem and solution",
        _any("problem"),
        readers.asks("problem", ("solution", "answer", "response")),
    ),
    Format(
        "inputs_targets",
        "FLAN's inputs and targets",
        _any("inputs"),
        readers.asks("inputs", ("targets",)),
    ),
    Format(
        "input_output",
        "input and output",
        lambda c: "input" in c and "output" in c.row,
        readers.asks("input", ("output",)),
    ),
)
BY_NAME: Mapping[str, Format] = {one.name: one for one in FORMATS}


# A row, read.

# Columns that hold a conversation, an answer, a label or a picture: never passed over in silence.
_CONTENT = {
    *TALKS,
    *PROMPTS,
    *SYSTEM,
    *ANSWERS,
    *("chosen", "rejected", "real", "generated", "history", "context", "turns", "choices", "completions"),
    *("images", "image", "videos", "video", "audio", "audios", "tools", "functions", "endings"),
    *("response_1", "response_2", "preferred_output", "non_preferred_output", "kto_tag", "data"),
    *("annotators", "option1", "option2", "mc1", "mc2"),
}  # fmt: skip


class Read(NamedTuple):
    """A row, read."""

    format: Format
    content: RowContent
    used: tuple[str, ...]
    ignored: tuple[str, ...]


def read_row(where: str, row: Row, options: FieldOptions, beside: Sequence[str] = ()) -> Read:
    """What a row holds and by which format; `beside`: columns that the caller reads itself.

    Raises DataError with `where` for a malformed row.
    """
    cells, names = _named(where, row, options)
    format = _format_of(cells, row, options)
    content: RowContent
    try:
        content = format.read(cells)
    except NoTurns as reason:
        content = str(reason)
    if not isinstance(content, str) and any(one.messages[-1].role != "user" for one in content):
        raise cells.fail(
            "the prompt does not end with the user's turn; leave what follows to the answers"
        )
    lost = [name for name in cells.row if _would_be_lost(cells, name, content, options)]
    if lost:
        raise cells.fail(
            f"{', '.join(map(repr, lost))} would be lost beside {', '.join(map(repr, cells.used))}; pass over with "
            f"data.ignore: [{', '.join(lost)}], or say with data.format which columns are meant"
        )
    used = [names.get(name, name) for name in cells.used if name in cells.row]
    ignored = [name for name in row if name not in used and name not in beside]
    return Read(format, content, tuple(used), tuple(ignored))


def _renames(options: FieldOptions) -> Iterator[tuple[str, str | None]]:
    """What each column is called in this file, by its own name; None: it is passed over."""
    yield "prompt", options.prompt_field
    yield "response", options.response_field
    yield "messages", options.messages_field
    yield "chosen", options.chosen_field
    yield "rejected", options.rejected_field
    yield "system", options.system_field
    if options.input_field is not None:
        yield "input", options.input_field


def _named(where: str, row: Row, options: FieldOptions) -> tuple[Cells, dict[str, str]]:
    """The row under the names that the formats know, and what those columns are called in the file."""
    renames = {name: given for name, given in _renames(options) if given != name}
    moved = {given: name for name, given in renames.items() if given is not None}
    cells = {
        name: value
        for name, value in row.items()
        if name not in options.ignore and name not in renames and name not in moved
    }
    for given, name in moved.items():
        if row.get(given) is not None:
            cells[name] = row[given]
    # data.response_field: chosen makes the better answer the target, and it stays the better answer.
    for name in ("chosen", "rejected"):
        if name in moved and name not in renames and name in row:
            cells[name] = row[name]
    written = Cells(where, cells, texts_only=isinstance(row, TextRow))
    return written, {name: given for given, name in moved.items()}


def _format_of(cells: Cells, row: Row, options: FieldOptions) -> Format:
    if options.format is not None:
        format = BY_NAME[options.format]
        if not format.fits(cells):
            raise DataError(
                f"{cells.where} has not the columns of data.format {format.name} ({format.about}); its columns: "
                f"{_columns(row, options)}; leave data.format out, or correct the row"
            )
        return format
    for one in FORMATS:
        if one.fits(cells):
            return one
    raise DataError(_missing(cells.where, row, options))


def _columns(row: Row, options: FieldOptions) -> str:
    return ", ".join(repr(str(name)[:40]) for name in row if name not in options.ignore) or "none"


def _missing(where: str, row: Row, options: FieldOptions) -> str:
    """Why a row that fits no format has no prompt, in the file's own names of columns."""
    wanted = [field for field in (options.prompt_field, options.messages_field) if field]
    asks = [*wanted, *TALKS, *(name for name in PROMPTS if name != "input")]
    blank = next((name for name in asks if name in row and empty(row[name])), None)
    if blank is not None:
        return f"{where}: {blank!r} is empty; fill it in or remove the row"
    return (
        f"{where} has no {' or '.join(map(repr, wanted))} (its columns: {_columns(row, options)}); set "
        "data.prompt_field or data.messages_field to the column that holds it, or data.format to a format of docs/data.md"
    )


def _would_be_lost(cells: Cells, name: str, content: RowContent, options: FieldOptions) -> bool:
    """Whether a column has content that nobody has read; one that repeats what was read counts as read."""
    if name not in _CONTENT or name not in cells or name in cells.used:
        return False
    if isinstance(content, str) or options.format is not None:
        return False
    if name == "turns" and isinstance(cells.row[name], int):
        return False  # how many there are
    known = {" ".join(text.split()) for entry in content for text in entry.texts}
    said = list(_texts(cells.row[name]))
    if said and all(" ".join(text.split()) in known for text in said):
        cells.used[name] = None
        return False
    return True


def _texts(value: object) -> Iterator[str]:
    """The texts in a cell, roles left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if key not in ("role", "from", "type"):
                yield from _texts(one)
    elif value is not None:
        yield str(value)
