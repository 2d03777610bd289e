"""Stages in processes of their own: started by a launcher, watched, ended together; a failure's cause becomes an error message.

Each process leaves a log and a note of how it ended in a folder, so that the cause of a failure is reported
the same whatever the launcher and wherever the process ran. The worker's side is worker.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from prefloop.errors import LaunchError, RunFolderError
from prefloop.recipe.options import LaunchOptions
from prefloop.records import read_json

_POLL = 0.2

_GRACE = 30.0
"""Seconds that processes have to end by themselves."""

_LAST_LINES = 5

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Opened before any fork: afterwards a lock of the loader's may be held for ever.
_LIBC = ctypes.CDLL(None)


class Stage(NamedTuple):
    """What the processes are to do."""

    run: Path
    round: int
    """-1 is `start`."""
    name: str
    folder: Path
    """Holds the folder `processes` while they work, and after a failure."""

    @property
    def notes(self) -> Path:
        """Where they leave logs and notes."""
        return self.folder / "processes"


def run_processes(
    options: LaunchOptions, stage: Stage, watch: Callable[[], None]
) -> dict[str, Any]:
    """Start the processes, wait, and return the facts that the first of them reports.

    `watch` is called while they work. They are ended with this process, however it ends. Raises
    LaunchError with the cause where one of them fails.
    """
    words = options.words()
    _wait_for_stragglers(stage.run)
    shutil.rmtree(stage.notes, ignore_errors=True)
    stage.notes.mkdir(parents=True)
    command = [*words, "-m", "prefloop.run.worker", str(stage.run), str(stage.round), stage.name]
    with (stage.notes / "launcher.log").open("wb") as log:
        launcher = subprocess.Popen(
            [*command, str(stage.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(options),
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    try:
        while launcher.poll() is None:
            watch()
            time.sleep(_POLL)
    finally:
        if launcher.poll() is None:
            _end(launcher)
    watch()
    facts = stage.notes / "facts.json"
    if launcher.returncode or not facts.exists():
        raise LaunchError(_cause(stage, launcher.returncode))
    result = read_json(facts)
    shutil.rmtree(stage.notes)
    return result


def end_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the parent dies, be it by SIGKILL; Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def working_in(run: Path) -> Any:
    """A lock that each process holds while it works in a run; give it back by closing it."""
    lock = (run / ".workers").open("w")
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def _wait_for_stragglers(run: Path) -> None:
    """Processes of a parent that was killed end by themselves, a little later than it did."""
    deadline = time.monotonic() + _GRACE
    with (run / ".workers").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RunFolderError(
                        f"processes of an earlier start are still at work in {run}; end them first"
                    ) from error
                time.sleep(_POLL)
            else:
                return


def _environment(options: LaunchOptions) -> dict[str, str]:
    environment = dict(os.environ)
    # Launchers set this themselves; what the user has set must be told apart.
    if "OMP_NUM_THREADS" in environment:
        environment["PREFLOOP_THREADS"] = environment["OMP_NUM_THREADS"]
    if options.sharding == "fsdp2":
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return environment


def _end(launcher: subprocess.Popen[bytes]) -> None:
    os.killpg(launcher.pid, signal.SIGTERM)
    try:
        launcher.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def _cause(stage: Stage, code: int) -> str:
    """Why the processes failed: a user's error, else who died without a word, else who failed first."""
    logs = {int(log.stem[5:]): log for log in stage.notes.glob("rank-*.log")}
    notes = {
        int(note.stem[5:]): json.loads(note.read_text(encoding="utf-8"))
        for note in stage.notes.glob("rank-*.json")
    }
    failed = sorted(notes.items(), key=lambda item: item[1]["time"])
    for _, note in failed:
        if note["ended"] == "user error":
            return str(note["says"])
    goes_on = (
        f"the same command goes on from the last checkpoint, and all they said is in {stage.notes}"
    )
    for rank in sorted(logs.keys() - notes.keys()):
        said = _last_lines(logs[rank])
        return (
            f"process {rank} of {stage.name} died without a word, as one that is killed or finds no "
            f"memory does{f' (its last lines: {said})' if said else ''}; {goes_on}"
        )
    for rank, note in failed:
        if note["ended"] == "error":
            return f"process {rank} of {stage.name} failed with {note['says']}; {goes_on}"
    said = _last_lines(stage.notes / "launcher.log")
    return (
        f"the launcher of {stage.name} ended with code {code} (its last lines: {said}); {goes_on}"
    )


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(line.strip() for line in lines[-_LAST_LINES:])
