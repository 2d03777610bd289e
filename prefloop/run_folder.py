"""The run's folder: where each artifact lies, which stages are done, and how a killed one goes on.

A stage that writes records goes through a Journal: whole chunks only, and after each chunk the sizes
of its files are noted. A killed stage is cut back to the last note and continues there. Its manifest,
`STAGE.done.json`, is written last, by an atomic rename: where it lies, the stage is not run again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from hashlib import file_digest
from pathlib import Path
from typing import Any, TypeVar

import yaml
from safetensors import SafetensorError

from prefloop.errors import RunFolderError
from prefloop.machine import environment, installed_versions, peak_memory_mb
from prefloop.records import (
    Pair,
    Record,
    Reject,
    RoundResult,
    read_json,
    read_jsonl,
)

R = TypeVar("R", bound=Record)

REJECTS = "rejects.jsonl"

_FULL = os.strerror(errno.ENOSPC)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class RoundDir:
    """One round's folder."""

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        self.number = number

    @property
    def policy(self) -> Path:
        """The policy at the round's end: a LoRA adapter or a whole model."""
        return self.path / "policy"

    @property
    def train(self) -> Path:
        """Training checkpoints and the metrics of each optimiser step."""
        return self.path / "train"

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left behind; None while it is not finished."""
        path = self.path / f"{stage}.done.json"
        return read_json(path) if path.exists() else None

    def finish(self, stage: str, **facts: Any) -> None:
        """Mark a stage as done; `facts` are counts, failures, hashes and seconds."""
        facts = {"stage": stage, **facts, "peak_memory_mb": peak_memory_mb()}
        facts["versions"] = installed_versions()
        write_atomically(self.path / f"{stage}.done.json", json.dumps(facts, indent=1) + "\n")
        (self.path / f"{stage}.progress.json").unlink(missing_ok=True)

    def stream(self, stage: str, kind: type[R]) -> Iterator[R]:
        """The records that a stage wrote, one by one."""
        return read_jsonl(self.path / f"{stage}.jsonl", kind)

    def records(self, stage: str, kind: type[R]) -> list[R]:
        """All records that a stage wrote, in memory."""
        return list(self.stream(stage, kind))

    def count(self, stage: str) -> int:
        """How many records a stage wrote."""
        with (self.path / f"{stage}.jsonl").open("rb") as file:
            return sum(1 for _ in file)

    def rejects(self) -> Iterator[Reject]:
        """The round's rejects so far, one by one."""
        path = self.path / REJECTS
        return read_jsonl(path, Reject, growing=True) if path.exists() else iter(())

    def reasons(self) -> Counter[str]:
        """Why prompts gave no pair so far, and how many."""
        return Counter(reject.reason for reject in self.rejects())

    def steps(self) -> int:
        """Optimiser steps that the round's training has logged."""
        path = self.train / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def digest(self, stage: str) -> str:
        """Hash of a stage's records: what the next stage's manifest names as its input."""
        with (self.path / f"{stage}.jsonl").open("rb") as file:
            return file_digest(file, "sha256").hexdigest()[:16]


class RunDir:
    """A run's folder, locked by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def round(self, number: int) -> RoundDir:
        """A round's folder, made if missing; -1 is `start`, where the initial policy is measured."""
        path = self.path / "rounds" / ("start" if number < 0 else f"{number:04d}")
        path.mkdir(parents=True, exist_ok=True)
        return RoundDir(path, number)

    @property
    def start(self) -> RoundDir:
        """Where the initial policy is measured; it may not exist yet."""
        return RoundDir(self.path / "rounds" / "start", -1)

    def rounds(self) -> list[RoundDir]:
        """The rounds that exist, in order, without `start`."""
        folders = sorted((self.path / "rounds").glob("[0-9]*"))
        return [RoundDir(folder, int(folder.name)) for folder in folders]

    def pairs(self, rounds: Iterable[int] | None = None) -> list[tuple[RoundDir, list[Pair]]]:
        """Pairs of the rounds that have made theirs; `rounds` picks some. Raises RunFolderError."""
        made = [round_dir for round_dir in self.rounds() if round_dir.manifest("pairs")]
        missing = sorted(set(rounds or ()) - {round_dir.number for round_dir in made})
        if missing:
            raise RunFolderError(
                f"{self.path} has no pairs of round {missing[0]}; it has {len(made)} rounds with pairs"
            )
        return [
            (round_dir, round_dir.records("pairs", Pair))
            for round_dir in made
            if rounds is None or round_dir.number in rounds
        ]

    def results(self) -> list[RoundResult]:
        """Measures of the start and of every measured round, in order."""
        everywhere = [self.start, *self.rounds()]
        return [
            result
            for round_dir in everywhere
            if round_dir.manifest("result")
            for result in round_dir.records("result", RoundResult)
        ]

    def first_day(self) -> date:
        """The day on which the run began: what chat templates are told, on whatever day it goes on."""
        path = self.path / "environment.json"
        found = read_json(path) if path.exists() else {}
        try:
            return date.fromisoformat(str(found.get("date")))
        except ValueError:
            # Made by an earlier version; or read while another process makes it.
            return date.today()

    def events(self) -> list[dict[str, Any]]:
        """The diary so far, without a line that is still being written."""
        path = self.path / "events.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunFolderError(
                f"{path} is damaged ({error}); mend or remove that line"
            ) from error

    def event(self, kind: str, **facts: Any) -> None:
        """Append to the diary of the run."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": kind, **facts}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def open_run(path: Path, recipe: str) -> Iterator[RunDir]:
    """Create or continue the run in `path` with this resolved recipe (YAML); holds the lock.

    Raises RunFolderError if the folder belongs to another recipe, is in use, or cannot be written.
    """
    with alone_in(path, "process"), _failures_in_words(path):
        _claim(path, recipe)
        yield RunDir(path)


@contextmanager
def alone_in(folder: Path, who: str) -> Iterator[None]:
    """Hold the folder's lock, making the folder; it ends with the process. `who` is what else could hold it.

    Raises RunFolderError where that is so, or where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RunFolderError(
            f"cannot write to {folder}: {error.strerror}; choose another --out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"{folder} is in use by another {who}; wait for it or choose another --out"
            ) from error
        yield


@contextmanager
def _failures_in_words(path: Path) -> Iterator[None]:
    """What the system or a library says about a run's files, as a sentence with a remedy."""
    try:
        yield
    except Exception as error:
        # Writers in Rust (safetensors, tokenizers) raise kinds of their own, with the system's words.
        if _FULL in str(error):
            raise RunFolderError(
                f"the disk of {path} is full; free some space, then the same command goes on "
                "where it stopped"
            ) from error
        if isinstance(error, SafetensorError) or _is_gone(error, path):
            raise RunFolderError(
                f"a file of {path} is damaged or gone ({error}); delete the folder of its round to "
                "redo it"
            ) from error
        raise


def _is_gone(error: Exception, path: Path) -> bool:
    return isinstance(error, FileNotFoundError) and str(path) in str(error)


def read_run(path: Path) -> RunDir:
    """A run to look at, finished or not; takes no lock. Raises RunFolderError if `path` is no run."""
    if not (path / "recipe.yaml").is_file():
        raise RunFolderError(f"{path} is no run (it has no recipe.yaml); name a folder below runs/")
    return RunDir(path)


def _claim(path: Path, recipe: str) -> None:
    """Leave recipe and environment in a new folder; refuse a folder that another recipe made."""
    stored, around = path / "recipe.yaml", path / "environment.json"
    if not stored.exists():
        ours = (".lock", "recipe.yaml.tmp")
        strangers = [child.name for child in path.iterdir() if child.name not in ours]
        if strangers:
            raise RunFolderError(
                f"{path} holds {strangers[0]!r} but no recipe.yaml, so it is no run; choose another --out"
            )
        # The recipe goes first: it alone makes the folder a run, whenever the process is killed.
        write_atomically(stored, recipe)
    if not around.exists():
        _note_environment(around)
    try:
        old = yaml.safe_load(stored.read_text(encoding="utf-8"))
        if not isinstance(old, dict):
            raise ValueError("it holds no sections")
    except (yaml.YAMLError, ValueError) as error:
        raise RunFolderError(
            f"{stored} is damaged ({error}); choose another --out, or delete {path} to begin again"
        ) from error
    changed = differences(old, yaml.safe_load(recipe))
    if changed and not _has_made_something(path):
        # Its first attempt ended before its first chunk: a mended recipe may take its place.
        shutil.rmtree(path / "rounds", ignore_errors=True)
        write_atomically(stored, recipe)
        _note_environment(around)
    elif changed:
        raise RunFolderError(
            f"{path} was started with another recipe ({'; '.join(changed[:5])}); "
            "run with the old values, or choose another --out"
        )


def _note_environment(path: Path) -> None:
    around = {"date": date.today().isoformat(), **environment()}
    write_atomically(path, json.dumps(around, indent=1) + "\n")


def _has_made_something(path: Path) -> bool:
    records = (path / "rounds").rglob("*.json*")
    return any(
        file.name.endswith(".done.json") or (file.suffix == ".jsonl" and _size(file))
        for file in records
    )


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two resolved recipes differ: "train.lr was 1e-06, now 1e-05"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{place}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{place} was {old}, now {new}"]


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place; what lay there before is gone only afterwards."""
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def give_usual_modes(folder: Path) -> None:
    """Give a folder and its files the modes that the umask gives to new ones.

    mkdtemp makes its folders, and safetensors its files, for their owner alone.
    """
    probe = folder / ".mode"
    probe.mkdir()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    folder.chmod(mode)
    for file in folder.iterdir():
        file.chmod(mode & 0o666 if file.is_file() else mode)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """What each optimiser step logged. Raises RunFolderError for a damaged line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RunFolderError(
                f"{path}:{number} is damaged ({error.msg}); delete {path.parent.parent} to redo the round"
            ) from error
    return rows


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves to look at."""

    folder: Path
    policy: Path
    """The policy that the run recommends: the last round's, or the best one's under `best_round`."""
    results: list[RoundResult]
    """Measures of the start (-1) and of each measured round."""
