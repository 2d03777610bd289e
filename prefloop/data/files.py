"""Data files, row by row: JSON Lines, JSON, CSV, TSV, Parquet and Arrow, plain or compressed.

A cell is what the file says: a text of a CSV file stays a text ("007", "None", "NA"), and an empty one is
missing. What a reader would have to guess or drop (a short line, a column named twice) is an error.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from prefloop.errors import DataError

Row: TypeAlias = Mapping[str, object]

Located: TypeAlias = tuple[str, Row]
"""Where a row was found ("train.jsonl:12"), and the row."""

WRAPPERS = ("data", "rows", "examples", "instances", "records", "items")
"""Keys under which an object holds a JSON file's list of rows."""


class DataFile(NamedTuple):
    """A file that holds rows."""

    path: Path
    name: str
    """What errors call it."""
    kind: str
    """The ending that says how it is read: ".jsonl"."""
    packing: str
    """The ending that says how it is compressed: ".gz"; empty where it is not."""

    @property
    def stem(self) -> str:
        """The name without folder and endings."""
        return Path(self.name).name[: -len(self.kind + self.packing)]


def data_file(path: Path, name: str | None = None) -> DataFile | None:
    """The file as one that can be read, going by the endings of `name` (null: of the path); else None."""
    name = name or str(path)
    endings = [ending.lower() for ending in Path(name).suffixes]
    packing = endings.pop() if endings and endings[-1] in _PACKINGS else ""
    kind = endings[-1] if endings else ""
    if kind not in READERS or (packing and kind in _BINARY):
        return None
    return DataFile(path, name, kind, packing)


def read_file(file: DataFile) -> Iterator[Located]:
    """The rows of a file, streamed. Raises DataError with the line of what cannot be read."""
    return READERS[file.kind](file)


# Bytes and lines.


def _zstd(path: Path) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


_PACKINGS: Mapping[str, Callable[[Path], Any]] = {
    "": lambda path: open(path, "rb"),  # noqa: SIM115, PTH123
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


def _lines(file: DataFile) -> Iterator[tuple[int, str]]:
    # Bytes are decoded line by line, so that a wrong encoding can be named by its line.
    number = 0
    try:
        with _PACKINGS[file.packing](file.path) as stream:
            for number, raw in enumerate(stream, start=1):
                if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{file.name}:1 is UTF-16; save the file as UTF-8")
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name}:{number} is not UTF-8; save the file as UTF-8") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(_unpackable(file, number, error)) from error
    except OSError as error:
        if (
            error.strerror is None
        ):  # what a decompressor says of the bytes, not the system of the file
            raise DataError(_unpackable(file, number, error)) from error
        raise DataError(
            f"{file.name} cannot be read ({error.strerror}); mend that first"
        ) from error


def _unpackable(file: DataFile, number: int, error: Exception) -> str:
    reason = str(error).partition("\n")[0].rstrip(".")
    return f"{file.name}:{number + 1} cannot be unpacked as {file.packing} ({reason}); fetch the file again"


# JSON.


def _object(where: str, value: object) -> Located:
    if not isinstance(value, dict):
        raise DataError(f'{where} is not an object; every row must be one, as {{"prompt": "Hi"}}')
    return where, value


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose keys are all different: of two equal ones, Python would keep the last."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return unique


def _json(file: DataFile, text: str, first_line: int = 1) -> object:
    try:
        # Without the line's end, at which what is missing would be named as the next line's fault.
        return json.loads(text.rstrip(), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{file.name}:{line} is not JSON ({error.msg}); correct this line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        reason = str(error).partition(";")[0]
        raise DataError(
            f"{file.name}:{first_line} cannot be read ({reason}); correct it"
        ) from error


def _read_jsonl(file: DataFile) -> Iterator[Located]:
    for number, line in _lines(file):
        if line.strip():
            yield _object(f"{file.name}:{number}", _json(file, line, number))


def _read_json(file: DataFile) -> Iterator[Located]:
    """A list of objects, or an object with one, held in memory while it is read; else objects line by line."""
    start = next((line for _, line in _lines(file) if line.strip()), "").strip()
    if not start.startswith("[") and not _wraps(start):
        yield from _read_jsonl(file)
        return
    value = _json(file, "".join(line for _, line in _lines(file)))
    if isinstance(value, dict):
        value = _unwrapped(file, value)
    assert isinstance(value, list)
    for number, row in enumerate(value, start=1):
        yield _object(f"{file.name}, item {number}", row)


def _wraps(line: str) -> bool:
    """Whether a file that begins with this line is one object over all, not one a line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith("{") and line.rstrip()[-1:] in "{[,"  # it goes on in the next line
    return isinstance(value, dict) and bool(_lists(value))


def _lists(value: Mapping[str, object]) -> list[str]:
    return [
        name
        for name in WRAPPERS
        if isinstance(rows := value.get(name), list) and all(isinstance(row, dict) for row in rows)
    ]


def _unwrapped(file: DataFile, value: dict[str, Any]) -> object:
    names = _lists(value)
    if len(names) == 1:
        return value[names[0]]
    if names:
        raise DataError(
            f"{file.name}:1 holds the lists {', '.join(map(repr, names))}; write the one that is meant "
            "to a file of its own"
        )
    return [value]


# CSV.


def _read_csv(file: DataFile) -> Iterator[Located]:
    csv.field_size_limit(2**31 - 1)  # cells longer than 131,072 characters are texts, too
    lines = (line for _, line in _lines(file))
    head = next(lines, "")
    reader = csv.reader(_again(head, lines), strict=True, delimiter=_delimiter(file, head))
    try:
        names = next(reader, [])
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise csv.Error(f"its header names the column {twice[0]!r} twice")
        before = reader.line_num
        for cells in reader:
            if cells:
                yield f"{file.name}:{before + 1}", _cells(names, cells)
            before = reader.line_num
    except csv.Error as error:
        where = f"{file.name}:{reader.line_num}"
        raise DataError(f"{where} is not CSV ({error}); check its quotes and commas") from error


def _again(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(file: DataFile, head: str) -> str:
    if file.kind == ".tsv":
        return "\t"
    return next((mark for mark in ",;\t" if mark in head), ",")


class TextRow(dict[str, object]):
    """A row of a table of texts, whose cells write lists as JSON."""


def _cells(names: list[str], cells: list[str]) -> Row:
    if len(cells) > len(names):
        raise csv.Error("more cells than the header has")
    if len(cells) < len(names):
        raise csv.Error("fewer cells than the header has")
    return TextRow((name, cell or None) for name, cell in zip(names, cells, strict=True))


# Parquet and Arrow.


def _read_parquet(file: DataFile) -> Iterator[Located]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    def batches() -> Iterator[Any]:
        with pq.ParquetFile(file.path) as opened:
            yield from opened.iter_batches(batch_size=256)

    return _of_batches(file, batches())


def _read_arrow(file: DataFile) -> Iterator[Located]:
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(file.path)) as stream:
            try:
                opened = pa.ipc.open_file(stream)
            except pa.ArrowInvalid:  # the form that save_to_disk writes
                stream.seek(0)
                yield from pa.ipc.open_stream(stream)
            else:
                yield from map(opened.get_batch, range(opened.num_record_batches))

    return _of_batches(file, batches())


def _of_batches(file: DataFile, batches: Iterator[Any]) -> Iterator[Located]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            names = batch.schema.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{file.name} has the column {twice[0]!r} twice; rename one")
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(
            f"{file.name} cannot be read as a data set ({reason}); write the file again"
        ) from error


READERS: Mapping[str, Callable[[DataFile], Iterator[Located]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
_BINARY = {".parquet", ".arrow", ".feather"}
