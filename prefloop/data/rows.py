"""Rows out of files, folders, Hugging Face data sets and the embedded set, each with its place."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

from prefloop.errors import DataError
from prefloop.records import Message

EMBEDDED = "embedded:instructions"

Row: TypeAlias = Mapping[str, object]

Located: TypeAlias = tuple[str, Row]
"""Where a row was found ("train.jsonl:12"), and the row."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def open_rows(
    source: str, part: str, subset: str | None, split: str
) -> tuple[str, Iterator[Located]]:
    """The stem that generated ids begin with, and the rows; `part` is "train" or "eval".

    Raises DataError where the source does not exist or is none that can be read.
    """
    if source.startswith("embedded:"):
        if source != EMBEDDED:
            raise DataError(f"there is no {source!r}; the only embedded data set is {EMBEDDED!r}")
        return part, _read_jsonl(Path(__file__).parent / "instructions" / f"{part}.jsonl")
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in READERS:
            raise DataError(f"{source} ends in none of {', '.join(READERS)}; convert or rename it")
        return path.stem, READERS[suffix](path)
    if path.is_dir() or (suffix not in READERS and _HUB_NAME.fullmatch(source)):
        return f"{path.name}-{split}", _read_dataset(source, path, subset, split)
    raise DataError(_not_there(source, path))


def _not_there(source: str, path: Path) -> str:
    if path.exists():
        return f"{source} is neither a file nor a folder; write its rows to a file"
    if not path.parent.is_dir():
        return f"no file {source}: there is no folder {path.parent}; correct the path"
    beside = [entry.name for entry in path.parent.iterdir()]
    close = get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "a hub data set is written 'owner/name'"
    return f"no file or folder {source}; {hint}"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Bytes are decoded line by line, so that a wrong encoding can be named by its line.
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend that first") from error


def _object(where: str, value: object) -> Located:
    if not isinstance(value, dict):
        raise DataError(f'{where} is not an object; every row must be one, as {{"prompt": "Hi"}}')
    return where, value


def _json(path: Path, text: str, first_line: int = 1) -> object:
    try:
        # Without the line's end, at which what is missing would be named as the next line's fault.
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line} is not JSON ({error.msg}); correct this line") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        reason = str(error).partition(";")[0]
        raise DataError(f"{path}:{first_line} cannot be read ({reason}); correct it") from error


def _read_jsonl(path: Path) -> Iterator[Located]:
    for number, line in _lines(path):
        if line.strip():
            yield _object(f"{path}:{number}", _json(path, line, number))


def _read_json(path: Path) -> Iterator[Located]:
    """One list of objects, held in memory while it is read; else objects line by line."""
    _, start = next(_lines(path), (0, ""))
    if not start.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    rows = _json(path, "".join(line for _, line in _lines(path)))
    assert isinstance(rows, list)
    for number, row in enumerate(rows, start=1):
        yield _object(f"{path}, item {number}", row)


def _read_csv(path: Path) -> Iterator[Located]:
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error("more cells than the header has")
            first = reader.line_num - sum(cell.count("\n") for cell in row.values() if cell)
            yield f"{path}:{first}", {name: cell or None for name, cell in row.items()}
    except csv.Error as error:
        where = f"{path}:{reader.reader.line_num}"
        raise DataError(f"{where} is not CSV ({error}); check its quotes and commas") from error


READERS: Mapping[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": lambda path: _read_dataset(str(path), path, None, "train"),
}


def _read_dataset(source: str, path: Path, subset: str | None, split: str) -> Iterator[Located]:
    # Imported here: it takes seconds that `prefloop --help` must not wait for.
    from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # what it logs of an error is said below
    if not sys.stderr.isatty():
        disable_progress_bars()
    name = str(path)
    try:
        if path.is_file():
            data = load_dataset("parquet", data_files=name, split=split, streaming=True)
        elif any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            data = load_from_disk(name)
        else:
            data = load_dataset(name, subset, split=split)
        if isinstance(data, DatasetDict):
            if split not in data:
                raise ValueError(f"no split {split!r}, there are: {', '.join(data)}")
            data = data[split]
        # A saved data set may ask for tensors; rows must be plain Python.
        for number, row in enumerate(data.with_format(None), start=1):
            yield f"{source}, row {number}", row
    except (DatasetsError, OSError, ValueError, RuntimeError, IndexError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        remedy = (
            "write the file again"
            if path.is_file()
            else "check its name, data.split, data.eval_split, data.subset and the network"
        )
        raise DataError(f"{source} cannot be read as a data set ({reason}); {remedy}") from error


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
