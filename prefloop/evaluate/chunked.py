"""A measure's questions in chunks, each written when it is done, so that a killed evaluation goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from prefloop.evaluate.measures import Item
from prefloop.records import Record, read_jsonl, write_jsonl

T = TypeVar("T", bound=Record)


def chunks_of(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """The rows in order, at most `size` at a time."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def in_chunks(
    folder: Path,
    asked: object,
    chunks: Sequence[Sequence[T]],
    work: Callable[[int, Sequence[T]], Sequence[Item]],
) -> Iterator[Item]:
    """The items of every chunk in order; what `folder` already holds is read, not done again.

    `asked` is all that the items depend on besides subject and judge, whose own the folder must be (options,
    seed): with other options or other questions, the files have another name and nothing stale is read.
    """
    place = folder / digest(asked, chunks)
    place.mkdir(parents=True, exist_ok=True)
    for number, chunk in enumerate(chunks):
        path = place / f"{number:05d}.jsonl"
        if not path.exists():
            part = path.with_suffix(".part")
            write_jsonl(part, work(number, chunk))
            part.replace(path)  # a kill leaves no half chunk behind
        yield from read_jsonl(path, Item)


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits that change with the parts' contents, as `repr` shows them."""
    return sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
