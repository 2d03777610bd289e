"""A measure's records and answers, cached chunk by chunk so that a killed evaluation can continue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prefloop.data.prompts import DataOptions, read_prompts
from prefloop.errors import DataError
from prefloop.manifest import Manifest
from prefloop.records import (
    Prompt,
    Record,
    Request,
    Response,
    Sampling,
    derive_seed,
    read_jsonl,
    write_jsonl,
)

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine

R = TypeVar("R", bound=Record)
T = TypeVar("T")


def digest(*parts: object) -> str:
    """A hash (sixteen hexadecimal digits) of the parts' `repr`."""
    return sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def cached_records(
    folder: Path,
    rows: Sequence[T],
    kind: type[R],
    work: Callable[[Sequence[T], int], Iterable[R]],
    *,
    chunk: int,
) -> list[R]:
    """The records that `work` makes of each chunk of rows; a chunk whose file exists is read instead.

    `work` gets the chunk and its number, from which it derives its seed. `folder` must belong to these rows
    and options alone: its name holds their digest.
    """
    return cached_chunks(folder, chunks_of(rows, chunk), kind, work)


def cached_chunks(
    folder: Path,
    chunks: Sequence[Sequence[T]],
    kind: type[R],
    work: Callable[[Sequence[T], int], Iterable[R]],
) -> list[R]:
    """`cached_records` for rows that are already divided into chunks."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[R] = []
    for number, chunk in enumerate(chunks):
        path = folder / f"{number:05d}.jsonl"
        manifest = Manifest(
            path.with_suffix(".done.json"),
            f"delete {folder}, and the same command makes it again",
        )
        if manifest.verify() is None:
            part = path.with_suffix(".part")
            write_jsonl(part, work(chunk, number))
            part.replace(path)
            manifest.write({}, [path])  # last: a kill leaves no half chunk behind
        records += read_jsonl(path, kind)
    return records


def chunks_of(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """The rows in order, at most `size` at a time."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def held_out_prompts(source: str | None, limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of a source, named as in a recipe's data.eval. Raises DataError."""
    if source is None:
        raise DataError("it has no prompts: name some with --data, or in its option held_out")
    prompts = list(islice(read_prompts(source, DataOptions(), part="eval"), limit))
    if not prompts:
        raise DataError(f"{source} holds no prompts; name a source with some")
    return prompts


def answers_of(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    seed: int,
    folder: Path,
    chunk: int,
    label: str = "answers",
) -> list[Response]:
    """One answer for each prompt, cached in `folder`; equal arguments give equal answers."""

    def work(part: Sequence[Prompt], number: int) -> list[Response]:
        requests = [Request(messages=prompt.messages) for prompt in part]
        chunk_seed = derive_seed(seed, "held-out answers", number)
        return engine.sample(requests, sampling, seed=chunk_seed, label=label)

    cache_folder = folder / digest([prompt.messages for prompt in prompts], sampling, seed, chunk)
    return cached_records(cache_folder, prompts, Response, work, chunk=chunk)
