"""Rows out of files, folders, Hugging Face data sets and the embedded set, and the turns that rows hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prefloop.data.files import READERS, Located, Row, data_file, read_file
from prefloop.errors import DataError
from prefloop.records import Message

__all__ = ["EMBEDDED", "Located", "Row", "conversation", "filled_text", "is_data_file", "open_rows"]

EMBEDDED = "embedded:instructions"

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_data_file(source: str | Path) -> bool:
    """Whether the name has the ending of a file that is read, be the file there or not."""
    return data_file(Path(source)) is not None


def open_rows(
    source: str, part: str, subset: str | None, split: str, *, pairs: bool = False
) -> tuple[str, Iterator[Located]]:
    """The stem that generated ids begin with, and the rows; `part` is "train" or "eval".

    `pairs`: where "train" or "test" is no split, one with preferences stands for it. Raises DataError
    where the source does not exist or is none that can be read.
    """
    if source.startswith("embedded:"):
        if source != EMBEDDED:
            raise DataError(f"there is no {source!r}; the only embedded data set is {EMBEDDED!r}")
        own = data_file(Path(__file__).parent / "instructions" / f"{part}.jsonl")
        assert own is not None
        return part, read_file(own)
    path = Path(source).expanduser()
    file = data_file(path)
    if path.is_file():
        if file is None:
            raise DataError(_unknown_ending(source, path))
        return file.stem, read_file(file)
    if path.is_dir() or (file is None and _HUB_NAME.fullmatch(source)):
        from prefloop.data.hub import read_data_set

        return f"{path.name}-{split}", read_data_set(source, path, subset, split, pairs=pairs)
    raise DataError(_not_there(source, path))


_UNPACK = {".zip", ".tar", ".tgz", ".7z", ".rar", ".gz", ".zst", ".bz2", ".xz"}


def _unknown_ending(source: str, path: Path) -> str:
    known = ", ".join(READERS)
    if path.suffix.lower() in _UNPACK:
        return f"{source} is an archive without {known} before its ending; unpack or rename it"
    return f"{source} ends in none of {known}; convert or rename it"


def _not_there(source: str, path: Path) -> str:
    if path.exists():
        return f"{source} is neither a file nor a folder; write its rows to a file"
    if not path.parent.is_dir():
        return f"no file {source}: there is no folder {path.parent}; correct the path"
    beside = [entry.name for entry in path.parent.iterdir()]
    close = get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "a hub data set is written 'owner/name'"
    return f"no file or folder {source}; {hint}"


# Turns.

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_KEYS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"))
# What a turn may hold beside its text that would be lost without a word; "" and null are nothing.
_LOST = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images")


def conversation(
    where: str, field: str, value: object, *, answer_only: bool = False
) -> list[Message]:
    """Check that turns are {role, content}: a system turn if any, then user and assistant in turn.

    ShareGPT's {from, value} with its roles, the role "developer", content as parts of text, and turns as
    {input, output} are read as well. `answer_only`: may begin with the assistant, as the continuation of a
    prompt. Raises DataError with `where` and `field`.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: {field!r} must be a filled list of {{role, content}} turns")
    turns: list[Message] = []
    for number, turn in enumerate(_flat(value)):
        name = f"{field}[{number}]"
        role, content = _turn(where, name, turn)
        after_user = turns and turns[-1].role == "user"
        expected = {"assistant"} if after_user else {"user"}
        if answer_only and not turns:
            expected |= {"assistant"}
        if role not in expected and (role != "system" or number):
            raise DataError(
                f"{where}: {name} has the role {role!r} where {'assistant' if after_user else 'user'!r} must "
                "stand; let user and assistant alternate, after one system turn at most"
            )
        turns.append(Message(role=role, content=content))
    if turns[-1].role == "system":
        raise DataError(f"{where}: {field!r} holds a system turn only; add the user's")
    return turns


def _flat(value: Sequence[object]) -> Iterator[object]:
    """Turns; {input, output} is two of them."""
    for turn in value:
        if isinstance(turn, Mapping) and {k for k, v in turn.items() if v is not None} == {
            "input",
            "output",
        }:
            yield {"role": "user", "content": turn["input"]}
            yield {"role": "assistant", "content": turn["output"]}
        else:
            yield turn


def _turn(where: str, name: str, turn: object) -> tuple[str, str]:
    keys = isinstance(turn, Mapping) and next(
        (pair for pair in _KEYS if all(turn.get(key) is not None for key in pair)), None
    )
    if not isinstance(turn, Mapping) or not keys:
        called = isinstance(turn, Mapping) and (turn.get("tool_calls") or turn.get("function_call"))
        if called:
            raise DataError(_of_tools(where, name))
        raise DataError(f'{where}: {name} must be an object with "role" and "content"')
    lost = next((key for key in _LOST if turn.get(key)), None)
    if lost in ("tool_calls", "function_call"):
        raise DataError(_of_tools(where, name))
    if lost:
        raise DataError(
            f"{where}: {name} has {lost!r}, which would be lost; remove it from the data"
        )
    role = _ROLES.get(str(turn[keys[0]]).lower(), str(turn[keys[0]]))
    if role == "assistant" and (turn.get("weight") == 0 or turn.get("train") is False):
        raise DataError(
            f"{where}: {name} is marked as not to be trained on, and marks of turns are not read; remove "
            "the mark, or cut the conversation before it"
        )
    return role, _content(where, f"{name}.{keys[1]}", turn[keys[1]])


def _of_tools(where: str, name: str) -> str:
    return f"{where}: {name} calls a tool, and tools are not read; remove conversations with tools"


def _content(where: str, name: str, value: object) -> str:
    """A turn's text; a list of text parts is joined."""
    if not isinstance(value, list):
        return filled_text(where, name, value)
    texts: list[str] = []
    for number, part in enumerate(value):
        given: Any = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(given, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(
                f"{where}: {name}[{number}] is of type {kind!r}, and only text is read; remove it from the data"
            )
        texts.append(given)
    return filled_text(where, name, "".join(texts))


def filled_text(where: str, field: str, value: object) -> str:
    """The value as a text that is not empty; DataError with `where` and `field` where it is none."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is {type(value).__name__}, not text; convert it")
    if not value.strip():
        raise DataError(f"{where}: {field!r} is empty; fill it in or remove the row")
    if value.encode(errors="ignore").decode() != value:
        raise DataError(f"{where}: {field!r} holds half of a surrogate pair; remove it")
    return value
