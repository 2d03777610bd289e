"""Folders and Hugging Face data sets: which files belong to a split, and their rows.

Text files (CSV, JSON) are read by our own readers wherever they lie, so that a cell means the same in a
file, a folder and on the hub; the library `datasets` would turn "None" into nothing and "007" into 7.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prefloop.data.files import DataFile, Located, data_file, read_file
from prefloop.errors import DataError

_PLAIN = {"train", "test"}
# Where a data set has no split of that name: the names that published preference sets give it.
_PUBLISHED = {
    ("train", True): ("train_prefs",),
    ("test", True): ("test_prefs",),
    ("train", False): ("train_sft",),
    ("test", False): ("test_sft",),
}


def read_data_set(
    source: str, path: Path, subset: str | None, split: str, *, pairs: bool
) -> Iterator[Located]:
    """The rows of a folder or a data set on the hub; `pairs`: labelled pairs are wanted.

    Raises DataError where it cannot be read, or has no such split. "train" also finds "train_prefs" where
    pairs are wanted, else "train_sft"; "test" likewise.
    """
    # Imported here: it takes seconds that `prefloop --help` must not wait for.
    from datasets.exceptions import DatasetsError

    _silence()
    try:
        yield from _rows(source, path, subset, split, pairs)
    except (DatasetsError, OSError, ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(
            f"{source} cannot be read as a data set ({reason}); "
            "check its name, data.split, data.eval_split, data.subset and the network"
        ) from error


def _silence() -> None:
    from datasets import disable_progress_bars
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # what it logs of an error is said in ours
    if not sys.stderr.isatty():
        disable_progress_bars()


def _rows(
    source: str, path: Path, subset: str | None, split: str, pairs: bool
) -> Iterator[Located]:
    from datasets import load_dataset, load_dataset_builder

    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        yield from _numbered(source, _saved(path, split, pairs))
        return
    builder = load_dataset_builder(str(path), subset)
    named = builder.config.data_files or {}
    split = _existing(split, [str(name) for name in named], pairs)
    files = {str(name): _text_files(source, urls) for name, urls in named.items()}
    if files and all(file is not None for file in files.values()):
        yield from _of_files(files, split)  # type: ignore[arg-type]
    else:
        yield from _numbered(source, load_dataset(str(path), subset, split=split))


def _numbered(source: str, data: Any) -> Iterator[Located]:
    # A saved data set may ask for tensors; rows must be plain Python.
    for number, row in enumerate(data.with_format(None), start=1):
        yield f"{source}, row {number}", row


def _saved(path: Path, split: str, pairs: bool) -> Any:
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(path))
    if not isinstance(data, DatasetDict):
        return data
    name = _existing(split, list(data), pairs)
    if name not in data:
        raise ValueError(f"no split {split!r}, there are: {', '.join(data)}")
    return data[name]


def _existing(split: str, there: Sequence[str], pairs: bool) -> str:
    """The split; where the default one is missing, the published split that is used in its place."""
    if split in there or split not in _PLAIN:
        return split
    return next((name for name in _PUBLISHED[split, pairs] if name in there), split)


# Text files.


def _text_files(source: str, urls: Iterable[str]) -> list[Callable[[], DataFile]] | None:
    """How to get at each file, where all are CSV or JSON."""
    openers: list[Callable[[], DataFile]] = []
    for url in map(str, urls):
        remote = "://" in url
        shown = f"{source}, {url.rpartition('/')[2]}" if remote else url
        known = data_file(Path(url), shown)
        if known is None or known.kind in (".parquet", ".arrow", ".feather"):
            return None
        openers.append(_fetched(url, known) if remote else lambda known=known: known)  # type: ignore[misc]
    return openers


def _fetched(url: str, file: DataFile) -> Callable[[], DataFile]:
    def get() -> DataFile:
        from datasets import DownloadManager

        return file._replace(path=Path(DownloadManager().download(url)))

    return get


def _of_files(files: dict[str, list[Callable[[], DataFile]]], split: str) -> Iterator[Located]:
    def rows(name: str) -> Iterator[Located]:
        for get in files[name]:
            yield from read_file(get())

    if split in files:
        yield from rows(split)
        return
    from datasets import ReadInstruction

    names = {part for part in re.split(r"[+\[]", split) if part in files}
    if not names:
        raise ValueError(f"no split {split!r}, there are: {', '.join(files)}")
    # A slice may be in per cent or from the end, so its rows are counted first.
    counts = {name: sum(1 for _ in rows(name)) for name in names}
    for part in ReadInstruction.from_spec(split).to_absolute(counts):
        start, end = part.from_ or 0, counts[part.splitname] if part.to is None else part.to
        for number, row in enumerate(rows(part.splitname)):
            if start <= number < end:
                yield row
