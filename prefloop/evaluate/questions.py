"""Read and check the rows of evaluation files: text fields, unique ids, random subsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol, TypeVar

from prefloop.data.rows import Located, open_rows
from prefloop.errors import DataError
from prefloop.evaluate.cache import digest
from prefloop.records import derive_seed

T = TypeVar("T")


def read_rows(source: str, option: str, split: str = "test") -> list[Located]:
    """All rows of a file or data set, each with its location; DataError where there are none."""
    rows = list(open_rows(source, "eval", None, split)[1])
    if not rows:
        raise DataError(f"{option}: {source} holds no row; name a file that has some")
    return rows


class _Question(Protocol):
    @property
    def id(self) -> str: ...


Q = TypeVar("Q", bound=_Question)


def read_questions(
    source: str, option: str, question: Callable[[Located], Q], split: str = "test"
) -> list[Q]:
    """All rows, each converted by `question`; DataError where two have the same id."""
    rows = read_rows(source, option, split)
    questions = [question(row) for row in rows]
    check_unique_ids(rows, [one.id for one in questions])
    return questions


def text_of(row: Located, name: str) -> str:
    """The text of a field; DataError with the row's location where it holds none."""
    where, fields = row
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where} has no text in field {name!r}; it has: {', '.join(map(str, fields))}"
        )
    return value


def id_of(row: Located, text: str) -> str:
    """The row's id (field id or key), else a hash of its text."""
    row_id = row[1].get("id", row[1].get("key"))
    return digest(text) if row_id is None else str(row_id)


def check_unique_ids(rows: Sequence[Located], ids: Sequence[str]) -> None:
    """DataError where two rows have the same id: comparisons would take them for one question."""
    first: dict[str, str] = {}
    for (where, _), name in zip(rows, ids, strict=True):
        if name in first:
            raise DataError(
                f"{where} repeats the id {name!r} of {first[name]} (or its text, where neither has an id); give each "
                "row its own in field 'id'"
            )
        first[name] = where


def drawn(rows: Sequence[T], limit: int | None, *seed: int | str) -> list[T]:
    """`limit` rows drawn at random by the seed, in their original order; all rows without a limit."""
    if limit is None or limit >= len(rows):
        return list(rows)
    indices = Random(derive_seed(*seed)).sample(range(len(rows)), limit)
    return [rows[index] for index in sorted(indices)]
