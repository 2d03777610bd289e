"""The run's folder: where each artifact lies, which stages are done, and how a killed one goes on.

A stage that writes records goes through a Journal: whole chunks only, and after each chunk the sizes
of its files are noted. A killed stage is cut back to the last note and continues there. Its manifest,
`STAGE.done.json`, is written last, by an atomic rename: where it lies, the stage is not run again.

A manifest vouches for itself and for the files of its stage: sizes are compared when it is read, contents
when a file is. What is not as it was written is named, never used (docs/reliability.md).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml
from safetensors import SafetensorError

from prefloop.errors import PrefloopError, RunFolderError, counted, system_failure
from prefloop.machine import environment, installed_versions, peak_memory_mb
from prefloop.manifest import Manifest, hash_file, read_sealed, sealed, write_atomically
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
METRICS = "metrics.jsonl"
PUBLISHED = "policy"
"""The folder of the policy that a finished run recommends."""
REJECTING = ("candidates", "ranked", "pairs")
"""Stages that add to the round's rejects, in their order."""
_INPUTS = {"ranked": "candidates", "pairs": "ranked", "train": "pairs", "result": "answers"}


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

    def sealed(self, stage: str) -> Manifest:
        """The stage's manifest, whether or not it is written."""
        run = self.path.parent.parent
        return Manifest(
            self.path / f"{stage}.done.json",
            f"`prefloop verify {run} --redo` takes {stage} of {self.path.name} out, and the command that "
            "began the run makes it again",
        )

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left behind; None while it is not finished.

        Raises RunFolderError where the manifest, or the size of one of the stage's files, has changed.
        """
        return self.sealed(stage).read()

    def finish(self, stage: str, **facts: Any) -> None:
        """Mark a stage as done; `facts` are counts, failures, hashes and seconds."""
        facts = {"stage": stage, **facts, "peak_memory_mb": peak_memory_mb()}
        facts["versions"] = installed_versions()
        files, rejects = self.outputs(stage), self.path / REJECTS
        growing = [rejects] if stage in REJECTING[:-1] and rejects.exists() else []
        self.sealed(stage).write(facts, files, growing=growing)
        (self.path / f"{stage}.progress.json").unlink(missing_ok=True)

    def outputs(self, stage: str) -> list[Path]:
        """The files that a stage leaves and nobody touches afterwards, as far as they are there."""
        if stage in ("train", "sft"):
            # Checkpoints, and notes of processes, lie in folders and go when the stage is done.
            kept = [path for path in self.train.glob("*") if path.is_file()]
            found = [*kept, *self.policy.rglob("*"), self.path / "curve.jsonl"]
        else:
            found = [self.path / f"{stage}.jsonl"]
            found += [self.path / REJECTS] if stage == REJECTING[-1] else []
        return sorted(path for path in found if path.is_file())

    def verify(self, stage: str) -> dict[str, Any] | None:
        """`verify_made`, with the contents of all the stage's files compared."""
        self.sealed(stage).verify()
        return self.verify_made(stage)

    def verify_made(self, stage: str) -> dict[str, Any] | None:
        """The stage's manifest; None while it is not finished. What it was made from must be what lies there.

        Raises RunFolderError where that is not so, and where manifest or sizes have changed.
        """
        facts = self.manifest(stage)
        made_from = _INPUTS.get(stage)
        if facts is None or made_from is None or not self.sealed(made_from).path.exists():
            return facts
        if facts.get("input", "") not in ("", self.digest(made_from)):
            raise RunFolderError(
                f"{stage} of {self.path} was made from another {made_from}.jsonl than lies there; "
                f"{self.sealed(stage).remedy}"
            )
        return facts

    def verify_policy(self) -> None:
        """RunFolderError where the policy that a finished training has left is not as it was written, or was freed."""
        freed = (self.manifest("train") or {}).get("freed", {})
        if any(name.startswith(f"{self.policy.name}/") for name in freed):
            raise RunFolderError(
                f"the policy of {self.path} was freed (train.keep_last, or prefloop clean); take a later round's, or "
                "run the recipe into another --out"
            )
        for stage in ("train", "sft"):
            self.sealed(stage).verify(
                [path for path in self.outputs(stage) if self.policy in path.parents]
            )

    def metrics(self) -> Iterator[dict[str, Any]]:
        """What each optimiser step logged, one by one; none before training. Raises RunFolderError where it is damaged."""
        path = self.train / METRICS
        for stage in ("train", "sft"):
            self.sealed(stage).verify([path])
        return stream_metrics(path) if path.exists() else iter(())

    def verify_begun(self, stage: str) -> dict[str, Any]:
        """The note of a stage that is not finished, compared with its files; see chunks.Journal."""
        remedy = self.sealed(stage).remedy
        note = read_sealed(self.path / f"{stage}.progress.json", remedy)
        for name in (f"{stage}.jsonl", REJECTS):
            path, (wanted, seal) = self.path / name, note[name]
            if (have := _size(path)) < wanted:
                raise RunFolderError(
                    f"{path} is shorter than when it was written ({have} of {counted(wanted, 'byte')}); {remedy}"
                )
            if path.exists() and hash_file(path, wanted) != seal:
                raise RunFolderError(f"{path} is not as it was written; {remedy}")
        return note

    def weights(self, *, policy: bool = True) -> list[Path]:
        """Files of a finished round's training that only the next round needs: its policy, and tensors of training."""
        if self.number < 0 or not self.sealed("train").path.exists():
            return []
        found = [*self.train.glob("*.safetensors"), *(self.policy.rglob("*") if policy else ())]
        return sorted(path for path in found if path.is_file())

    def free(self, files: Iterable[Path]) -> None:
        """Delete some of `weights`; the round stays whole to `verify`. A killed call is simply made again."""
        files = list(files)
        self.sealed("train").release(files)
        for path in files:
            path.unlink(missing_ok=True)
        if self.policy.is_dir() and not any(path.is_file() for path in self.policy.rglob("*")):
            shutil.rmtree(self.policy)

    def drop(self, stage: str) -> None:
        """Take a stage out, so that it is made again; of those that add to the rejects also the later ones."""
        later = REJECTING[REJECTING.index(stage) :] if stage in REJECTING else (stage,)
        for name in later:
            for path in (self.path / f"{name}.{end}" for end in ("done.json", "progress.json")):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.path / f".{name}.parts", ignore_errors=True)
            if name in ("train", "sft"):
                shutil.rmtree(self.train, ignore_errors=True)
                shutil.rmtree(self.policy, ignore_errors=True)
                (self.path / "curve.jsonl").unlink(missing_ok=True)
            else:
                (self.path / f"{name}.jsonl").unlink(missing_ok=True)

    def rejects_before(self, stage: str) -> int:
        """Bytes of the rejects file that stages before this one have written."""
        if stage not in REJECTING:
            return _size(self.path / REJECTS)
        for name in reversed(REJECTING[: REJECTING.index(stage)]):
            facts = self.manifest(name)
            if facts is not None:
                return int(facts.get("growing", {}).get(REJECTS, [0])[0])
        return 0

    def stream(self, stage: str, kind: type[R]) -> Iterator[R]:
        """The records that a stage wrote, one by one; RunFolderError first where they have changed."""
        self.sealed(stage).verify([self.path / f"{stage}.jsonl"])
        return read_jsonl(self.path / f"{stage}.jsonl", kind)

    def records(self, stage: str, kind: type[R]) -> list[R]:
        """All records that a stage wrote, in memory."""
        return list(self.stream(stage, kind))

    def count(self, stage: str) -> int:
        """How many records a stage wrote."""
        self.sealed(stage).verify([self.path / f"{stage}.jsonl"])
        with (self.path / f"{stage}.jsonl").open("rb") as file:
            return sum(1 for _ in file)

    def rejects(self) -> Iterator[Reject]:
        """The round's rejects so far, one by one."""
        path = self.path / REJECTS
        for stage in REJECTING:
            self.sealed(stage).verify([path])
        return read_jsonl(path, Reject, growing=True) if path.exists() else iter(())

    def reasons(self) -> Counter[str]:
        """Why prompts gave no pair so far, and how many."""
        return Counter(reject.reason for reject in self.rejects())

    def steps(self) -> int:
        """Optimiser steps that the round's training has logged."""
        path = self.train / METRICS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def digest(self, stage: str) -> str:
        """Hash of a stage's records: what the next stage's manifest names as its input."""
        return hash_file(self.path / f"{stage}.jsonl")[:16]


class RunDir:
    """A run's folder, locked by one process at a time."""

    def __init__(self, path: Path, *, accept_changes: bool = False) -> None:
        """`accept_changes`: go on although an input is not what it was when the run began."""
        self.path = path
        self._accept_changes = accept_changes

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

    def pairs(self, rounds: Iterable[int] | None = None) -> list[tuple[RoundDir, Iterator[Pair]]]:
        """Pairs, one by one, of the rounds that have made theirs; `rounds` picks some. Raises RunFolderError."""
        made = [round_dir for round_dir in self.rounds() if round_dir.manifest("pairs")]
        missing = sorted(set(rounds or ()) - {round_dir.number for round_dir in made})
        if missing:
            raise RunFolderError(
                f"{self.path} has no pairs of round {missing[0]}; it has {counted(len(made), 'round')} with pairs"
            )
        return [
            (round_dir, round_dir.stream("pairs", Pair))
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
        """The diary so far; a damaged line is an event of the kind "damaged"."""
        path = self.path / "events.jsonl"
        return [event for event, _ in _diary(path)] if path.exists() else []

    def to_finish(self) -> str:
        """What a run that has not ended waits for, as an error says it; one that a guard stopped would stop again."""
        told = [event for event in self.events() if event["event"] in ("begin", "stop")]
        if told and (why := told[-1].get("sentence")):
            return f"it stopped: {why}"
        return "finish it with prefloop run"

    def verify_published(self) -> Path | None:
        """The recommended policy's folder; None before the run has ended. RunFolderError where it has changed."""
        self.published.verify()
        return self.path / PUBLISHED if (self.path / PUBLISHED).is_dir() else None

    @property
    def published(self) -> Manifest:
        """The manifest of the recommended policy, which lies beside it."""
        return Manifest(
            self.path / f"{PUBLISHED}.done.json",
            "the command that began the run copies it anew from its round",
        )

    def event(self, kind: str, **facts: Any) -> None:
        """Append to the diary of the run."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": kind, **facts}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def inputs(self) -> dict[str, str | int]:
        """What `same_inputs` has noted, by name; nothing before a run has begun."""
        path = self.path / "environment.json"
        return read_sealed(path, "delete it").get("inputs", {}) if path.exists() else {}

    def same_inputs(
        self, identities: Mapping[str, str | int], *, decisive: bool = True
    ) -> list[str]:
        """Compare inputs, by name, with those that the run began with; which differ, in words.

        Those that are seen for the first time are noted. Raises RunFolderError where a `decisive` one differs
        and changes are not accepted; accepted ones go to the diary and hold from then on.
        """
        path = self.path / "environment.json"
        facts = read_sealed(path, "delete it to have it written anew")
        known: dict[str, str | int] = facts.get("inputs", {})
        changed = [
            f"{name} was {known[name]}, now {value}"
            for name, value in identities.items()
            if name in known and known[name] != value
        ]
        if changed and decisive and not self._accept_changes:
            raise RunFolderError(
                f"{self.path} was begun with other inputs ({'; '.join(changed[:5])}); put the old ones back, "
                "or let prefloop run go on with these: --accept-changes"
            )
        if changed:
            self.event("changed inputs", changes=changed)
        if changed or identities.keys() - known.keys():
            write_atomically(path, sealed({**facts, "inputs": {**known, **identities}}))
        return changed


def _diary(path: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    """Events of the whole lines, and whether each is as it was written."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            event = json.loads(line)
            time = event["time"]
            yield event, bool(event["event"])
        except (ValueError, LookupError, TypeError, RecursionError):
            text = line.decode("utf-8", "replace")
            yield {"time": time, "event": "damaged", "line": text[:1000]}, False


def _heal_diary(path: Path) -> None:
    """Cut off a line that a kill or a full disk left half-written; set damaged ones apart."""
    if not path.exists():
        return
    lines = list(_diary(path))
    with path.open("rb") as file:
        torn = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
    if torn or not all(whole for _, whole in lines):
        write_atomically(path, "".join(json.dumps(event) + "\n" for event, _ in lines))


@contextmanager
def open_run(path: Path, recipe: str, *, accept_changes: bool = False) -> Iterator[RunDir]:
    """Create or continue the run in `path` with this resolved recipe (YAML); holds the lock.

    Raises RunFolderError if the folder belongs to another recipe, is in use, or cannot be written.
    """
    with alone_in(path, "process"), _failures_in_words(path):
        _claim(path, recipe)
        _heal_diary(path / "events.jsonl")
        yield RunDir(path, accept_changes=accept_changes)


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
                f"{folder} is in use by another {who}; wait for it, or name another folder"
            ) from error
        with disk_in_words(folder):
            yield


@contextmanager
def disk_in_words(folder: Path) -> Iterator[None]:
    """Inside, a disk that is full, limited or broken is a RunFolderError that says which of these."""
    try:
        yield
    except PrefloopError:
        raise
    except Exception as error:
        # Writers in Rust (safetensors, tokenizers) raise kinds of their own, with the system's words.
        if (words := system_failure(error, folder)) is not None:
            raise RunFolderError(words) from error
        raise


@contextmanager
def _failures_in_words(path: Path) -> Iterator[None]:
    """What a library says about a run's files, as a sentence with a remedy."""
    try:
        yield
    except Exception as error:
        damaged = isinstance(error, SafetensorError) or _is_gone(error, path)
        if damaged and system_failure(error, path) is None:
            raise RunFolderError(
                f"a file of {path} is damaged or gone ({error}); `prefloop verify {path} --redo` finds it "
                "and takes its stage out"
            ) from error
        raise


def _is_gone(error: Exception, path: Path) -> bool:
    return isinstance(error, FileNotFoundError) and str(path) in str(error)


def read_run(path: Path) -> RunDir:
    """A run to look at, finished or not; takes no lock.

    Raises RunFolderError if `path` is no run, or its recipe is not the one that it was begun with.
    """
    recipe, around = path / "recipe.yaml", path / "environment.json"
    if not recipe.is_file():
        raise RunFolderError(f"{path} is no run (it has no recipe.yaml); name a folder below runs/")
    if around.exists():
        facts = read_sealed(around, "delete it to have it written anew")
        if facts.get("recipe") not in (None, hash_file(recipe)):
            raise RunFolderError(
                f"{recipe} is not as it was written; put it back, or run the recipe into another --out"
            )
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
    try:
        old = yaml.safe_load(stored.read_text(encoding="utf-8"))
        if not isinstance(old, dict):
            raise ValueError("it holds no sections")
    except (yaml.YAMLError, ValueError) as error:
        raise RunFolderError(
            f"{stored} is damaged ({error}); choose another --out, or delete {path} to begin again"
        ) from error
    changed = differences(_decisive(old), _decisive(yaml.safe_load(recipe)))
    if changed and not _has_made_something(path):
        # Its first attempt ended before its first chunk: a mended recipe may take its place.
        shutil.rmtree(path / "rounds", ignore_errors=True)
        write_atomically(stored, recipe)
        around.unlink(missing_ok=True)
    elif changed:
        raise RunFolderError(
            f"{path} was started with another recipe ({'; '.join(changed[:5])}); "
            "run with the old values, or choose another --out"
        )
    if not around.exists():
        facts = {"date": date.today().isoformat(), **environment(), "recipe": hash_file(stored)}
        write_atomically(around, sealed(facts))
    read_run(path)


def _decisive(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe without what changes no record, and with each file under one name."""
    told = {key: _one_name(value) for key, value in recipe.items() if key != "name"}
    if isinstance(told.get("generate"), dict):
        told["generate"] = {k: v for k, v in told["generate"].items() if k != "batch_size"}
    if isinstance(told.get("train"), dict):
        told["train"] = {k: v for k, v in told["train"].items() if k != "keep_last"}
    return told


def _one_name(value: Any) -> Any:
    """`./rows.jsonl` and `rows.jsonl` are one file."""
    if isinstance(value, dict):
        return {key: _one_name(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_one_name(inner) for inner in value]
    if isinstance(value, str) and "://" not in value and value.startswith(("./", "../", "/")):
        return os.path.relpath(value)
    return value


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
    return list(stream_metrics(path))


def stream_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """What each optimiser step logged, one by one. Raises RunFolderError for a damaged line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise RunFolderError(
                    f"{path}:{number} is damaged ({error}); `prefloop verify RUN --redo` takes its stage out"
                ) from error


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves to look at."""

    folder: Path
    policy: Path
    """The policy that the run recommends: the last round's, or the best one's under `best_round`."""
    results: list[RoundResult]
    """Measures of the start (-1) and of each measured round."""
