"""Turns and texts of rows, checked: what prompts and labelled pairs are both made of."""

from __future__ import annotations

from prefloop.errors import DataError
from prefloop.records import Message


def conversation(
    where: str, field: str, value: object, *, answer_only: bool = False
) -> list[Message]:
    """Check that turns are {role, content}: a system turn if any, then user and assistant in turn.

    `answer_only` takes a lone assistant turn. Raises DataError with `where` and `field`.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {field!r} must be a filled list of {{role, content}} turns")
    turns: list[Message] = []
    for number, turn in enumerate(value):
        name = f"{field}[{number}]"
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise DataError(f'{where}: {name} must be an object with "role" and "content"')
        lone = answer_only and len(value) == 1
        expected = "assistant" if lone or (turns and turns[-1].role == "user") else "user"
        role = turn["role"]
        if role != expected and (role != "system" or number):
            raise DataError(
                f"{where}: {name} has the role {role!r} where {expected!r} must stand; let user and "
                "assistant alternate, after one system turn at most"
            )
        turns.append(
            Message(role=role, content=filled_text(where, f"{name}.content", turn["content"]))
        )
    if turns[-1].role == "system":
        raise DataError(f"{where}: {field!r} holds a system turn only; add the user's")
    return turns


def filled_text(where: str, field: str, value: object) -> str:
    """The value as a text that is not empty; DataError with `where` and `field` where it is none."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is {type(value).__name__}, not text; convert it")
    if not value.strip():
        raise DataError(f"{where}: {field!r} is empty; fill it in or remove the row")
    if value.encode(errors="ignore").decode() != value:
        raise DataError(f"{where}: {field!r} holds half of a surrogate pair; remove it")
    return value
