"""Playing a comparison's cells: each in a process of its own, several at a time, none stopping the others.

A cell that would do work that an earlier one does waits for it and takes it over (share.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from prefloop.compare.file import Cell
from prefloop.compare.reuse import FIRST_ROUND, START, inherit, stage_keys
from prefloop.errors import PrefloopError
from prefloop.run.launch import end_with_parent
from prefloop.run_folder import RoundDir, open_run

LOG = "console.log"
_POLL = 0.2
_GRACE = 30.0


class Running(Protocol):
    """A cell that is being played."""

    def poll(self) -> int | None:
        """Its exit code; None while it plays."""
        ...

    def terminate(self) -> None:
        """Ask it to end."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        ...


Start = Callable[[Cell, int], Running]
"""Start a cell, where so many are played at a time."""


def play(
    cells: Sequence[Cell],
    *,
    jobs: int,
    say: Callable[[str], None],
    beside: Sequence[Cell] = (),
    start: Start | None = None,
) -> dict[str, str]:
    """Play what is not played yet; why each cell failed that did, by its name.

    `beside` are cells that are not to be played, but may have done work already.
    """
    plan = _Plan([*(cell for cell in beside if cell.folder.exists()), *cells])
    table = _Table(plan, jobs, say, start or start_process)
    todo = list(cells)
    try:
        while todo or table.running:
            table.clear()
            cell = next((c for c in todo if table.is_free_for(c, todo)), None)
            if cell is None:
                time.sleep(_POLL)
                continue
            todo.remove(cell)
            table.seat(cell)
    finally:
        _end([seated.process for seated in table.running.values()])
    return table.failed


class _Seated(NamedTuple):
    cell: Cell
    process: Running
    since: float
    log_from: int
    """Bytes of its log that an earlier call's attempt has left."""


@dataclass
class _Table:
    """The cells that are being played, at most `jobs`."""

    plan: _Plan
    jobs: int
    say: Callable[[str], None]
    start: Start
    running: dict[str, _Seated] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def is_free_for(self, cell: Cell, todo: Sequence[Cell]) -> bool:
        waiting = {other.name for other in todo} | self.running.keys()
        return len(self.running) < self.jobs and self.plan.ready(cell, waiting)

    def seat(self, cell: Cell) -> None:
        try:
            if _is_played(cell):
                return
            shared = self.plan.hand_over(cell)
        except (PrefloopError, OSError) as error:  # OSError: of another cell's folder
            self._fail(cell.name, str(error))
            return
        self.say(f"{cell.name}: begins" + f", {', '.join(shared)} done before" * bool(shared))
        log = cell.folder / LOG
        size = log.stat().st_size if log.exists() else 0
        self.running[cell.name] = _Seated(cell, self.start(cell, self.jobs), time.monotonic(), size)

    def clear(self) -> None:
        for name, seated in list(self.running.items()):
            code = seated.process.poll()
            if code is None:
                continue
            del self.running[name]
            if code:
                self._fail(name, _reason(seated.cell.folder / LOG, seated.log_from, code))
            else:
                self.say(f"{name}: done in {time.monotonic() - seated.since:.0f} s")

    def _fail(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        self.say(f"{name}: failed: {reason}")


class _Plan:
    """Who takes what from whom."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        firsts: dict[str, Cell] = {}
        self.donors: dict[str, dict[str, Cell]] = {}
        """By cell and stage, the first cell that does the same."""
        for cell in cells:
            keys = stage_keys(cell.recipe)
            self.donors[cell.name] = {
                stage: firsts[key] for stage, key in keys.items() if key in firsts
            }
            for key in keys.values():
                firsts.setdefault(key, cell)
        self._begins_with_sft = {c.name for c in cells if c.recipe.sft is not None}

    def ready(self, cell: Cell, waiting: Set[str]) -> bool:
        """Whether nothing that the cell could take over is still to come, from the cells of these names."""
        return all(
            donor.name not in waiting or _has(donor, stage)
            for stage, donor in self.donors[cell.name].items()
        )

    def hand_over(self, cell: Cell) -> list[str]:
        """Let a cell take over what others have done of its work; returns the stages."""
        found = {
            stage: donor.folder
            for stage, donor in self.donors[cell.name].items()
            if _has(donor, stage)
        }
        if cell.name in self._begins_with_sft and "sft" not in found:
            found = {stage: folder for stage, folder in found.items() if stage not in START}
        with open_run(cell.folder, cell.recipe.dump()) as run:
            return inherit(run, found)


def sharing(cells: Sequence[Cell]) -> list[str]:
    """Which cell would take which stages from which, in a line each."""
    plan = _Plan(cells)
    lines = []
    for cell in cells:
        by_donor: dict[str, list[str]] = {}
        for stage, donor in plan.donors[cell.name].items():
            by_donor.setdefault(donor.name, []).append(stage)
        taken = "; ".join(f"{', '.join(found)} of {name}" for name, found in by_donor.items())
        lines.append(f"{cell.name}" + f"  shares {taken}" * bool(taken))
    return lines


def _has(cell: Cell, stage: str) -> bool:
    number = 0 if stage in FIRST_ROUND else -1
    folder = cell.folder / "rounds" / ("start" if number < 0 else f"{number:04d}")
    return RoundDir(folder, number).manifest(stage) is not None


def _is_played(cell: Cell) -> bool:
    """Whether the cell's run has ended; RunFolderError where the folder is another recipe's."""
    if not (cell.folder / "policy").is_dir():
        return False
    with open_run(cell.folder, cell.recipe.dump()) as run:
        return run.verify_published() is not None


def start_process(cell: Cell, jobs: int) -> subprocess.Popen[bytes]:
    """`prefloop run` of the cell's own recipe, in a process that ends with this one."""
    recipe = str(cell.folder / "recipe.yaml")
    command = [sys.executable, "-m", "prefloop", "run", recipe, "--out", str(cell.folder)]
    environment = dict(os.environ)
    if jobs > 1:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    with (cell.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=end_with_parent,
        )


def _end(processes: Sequence[Running]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            assert isinstance(process, subprocess.Popen)
            process.kill()


def _reason(log: Path, log_from: int, code: int) -> str:
    """Why a cell failed: the sentence of an error, the signal that ended it, or the last line of its log."""
    data = log.read_bytes()[log_from:] if log.exists() else b""
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("prefloop: ")]
    if code < 0 and not said:
        lines = [f"ended by signal {-code}"]
    last = (said or lines or [f"exit code {code}, and no word"])[-1]
    return f"{last.removeprefix('prefloop: ')} (all it said is in {log})"
