"""Pairs as a preference data set that other trainers read: TRL's conversational format, or ShareGPT's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefloop.errors import DataError, PrefloopError, RunFolderError
from prefloop.records import Pair

Format = Literal["jsonl", "parquet", "sharegpt"]
Row = dict[str, Any]
_ROWS_PER_GROUP = 1000
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
_FIELDS = ("target", "margin", "round", "prompt_id")


class Exported(NamedTuple):
    """Where the pairs went, and how many there are."""

    path: Path
    pairs: int


def export_pairs(
    pairs: Iterable[Pair], folder_or_file: Path | str, format: Format = "jsonl"
) -> Exported:
    """Write pairs as one file that ``datasets.load_dataset`` reads and TRL's ``DPOTrainer`` trains on.

    Columns: `prompt` (the turns), `chosen` and `rejected` (one assistant turn each), `target` (null
    where the method has none), `margin`, `round`, `prompt_id`; `chosen_token_ids` and `rejected_token_ids`, the
    tokens that the policy sampled (null where it sampled none), end of turn included where it ended. "sharegpt" is
    JSON lines with `conversations`, `chosen` and `rejected` as {from, value} turns, as LLaMA-Factory reads rankings.
    A folder gets `pairs.jsonl` or `pairs.parquet`. The file appears whole or not at all, and replaces an older one.
    Raises DataError where there are no pairs, or answers without another beside them, or the name fits
    no format; RunFolderError where the file cannot be written.
    """
    path = _destination(Path(folder_or_file), format)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        count = _write_whole(pairs, path, format)
    except PrefloopError:  # some are OSErrors too, and already say what is wrong
        raise
    except OSError as error:
        raise RunFolderError(
            f"cannot write {path} ({error.strerror or error}); export to another place"
        ) from error
    return Exported(path, count)


def as_row(pair: Pair) -> Row:
    """One pair as a row of the data set. Raises DataError where there is nothing to prefer it to."""
    if not pair.rejected:
        raise DataError(
            "the method of this run trains on single answers, so there are no pairs to export; "
            "take the targets from the data themselves"
        )
    return {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "target": pair.target,
        "margin": pair.margin,
        "round": pair.round,
        "prompt_id": pair.prompt_id,
        **{f"{role}_token_ids": _tokens(pair, role) for role in ("chosen", "rejected")},
    }


def _as_sharegpt(row: Row) -> Row:
    """The row with {from, value} turns in place of {role, content} ones; answers are single turns."""
    turns = {
        name: [{"from": _SPEAKERS[turn["role"]], "value": turn["content"]} for turn in row[name]]
        for name in ("prompt", "chosen", "rejected")
    }
    answers = {name: turns[name][0] for name in ("chosen", "rejected")}
    return {"conversations": turns["prompt"], **answers, **{name: row[name] for name in _FIELDS}}


def _tokens(pair: Pair, role: str) -> list[int] | None:
    return list(pair.token_ids[role]) if role in pair.token_ids else None


def _destination(path: Path, format: Format) -> Path:
    suffix = ".parquet" if format == "parquet" else ".jsonl"
    if path.is_dir() or not path.suffix:
        return path / f"pairs{suffix}"
    if path.suffix == suffix:
        return path
    raise DataError(
        f"{path} does not end in {suffix}; rename it so, name a folder, "
        f"or choose the format that its name asks for"
    )


def _write_whole(pairs: Iterable[Pair], path: Path, format: Format) -> int:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        count = _WRITERS[format](map(as_row, pairs), temporary)
        if not count:
            raise DataError(
                f"there are no pairs to export to {path}; run a round that makes some first"
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write_jsonl(rows: Iterator[Row], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _write_parquet(rows: Iterator[Row], path: Path) -> int:
    # Imported here because it takes longer than all the rest of the command line.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    # Spelled out: a column of nulls only (no targets) would otherwise lose its type.
    schema = pa.schema(
        {
            "prompt": turns,
            "chosen": turns,
            "rejected": turns,
            "target": pa.string(),
            "margin": pa.float64(),
            "round": pa.int64(),
            "prompt_id": pa.string(),
            "chosen_token_ids": pa.list_(pa.int64()),
            "rejected_token_ids": pa.list_(pa.int64()),
        }
    )
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, _ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


_WRITERS: dict[Format, Callable[[Iterator[Row], Path], int]] = {
    "jsonl": _write_jsonl,
    "parquet": _write_parquet,
    "sharegpt": lambda rows, path: _write_jsonl(map(_as_sharegpt, rows), path),
}
