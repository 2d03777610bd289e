"""Run a comparison's cells: each in its own process, several at a time; a failed one does not stop the others.

A cell waits for an earlier one that does the same work, and copies its result (reuse.py).
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
from prefloop.compare.reuse import FIRST_ROUND_STAGES, START_STAGES, copy_stages, stage_keys
from prefloop.errors import PrefloopError
from prefloop.recipe import DTYPE, dtype_of_run
from prefloop.run.launch import end_with_parent
from prefloop.run_folder import RoundDir, RunDir, open_run

LOG = "console.log"
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30.0


class Running(Protocol):
    """The process of a cell."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to end."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        ...


Start = Callable[[Cell, int], Running]
"""Starts a cell's process; the second argument is the number of cells that run at a time."""


def play(
    cells: Sequence[Cell],
    *,
    jobs: int,
    say: Callable[[str], None],
    other_cells: Sequence[Cell] = (),
    start: Start | None = None,
) -> dict[str, str]:
    """Run the cells that are not finished; returns the name of each failed cell with the reason.

    `other_cells` are not run, but their finished stages may be reused.
    """
    plan = _ReusePlan([*(cell for cell in other_cells if cell.folder.exists()), *cells])
    scheduler = _Scheduler(plan, jobs, say, start or start_process)
    todo = list(cells)
    try:
        while todo or scheduler.running:
            scheduler.collect_finished()
            cell = next((c for c in todo if scheduler.can_start(c, todo)), None)
            if cell is None:
                time.sleep(_POLL_SECONDS)
                continue
            todo.remove(cell)
            scheduler.start_cell(cell)
    finally:
        _terminate_all([played.process for played in scheduler.running.values()])
    return scheduler.failed


class _PlayedCell(NamedTuple):
    cell: Cell
    process: Running
    since: float
    log_from: int
    """Bytes in its log from an earlier attempt."""


@dataclass
class _Scheduler:
    """Starts cells, at most `jobs` at a time, and collects the failed ones."""

    plan: _ReusePlan
    jobs: int
    say: Callable[[str], None]
    start: Start
    running: dict[str, _PlayedCell] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def can_start(self, cell: Cell, todo: Sequence[Cell]) -> bool:
        waiting = {other.name for other in todo} | self.running.keys()
        return len(self.running) < self.jobs and self.plan.ready(cell, waiting)

    def start_cell(self, cell: Cell) -> None:
        try:
            if _is_played(cell):
                return
            stages = self.plan.copy_shared(cell)
        except (PrefloopError, OSError) as error:  # OSError: from copying another cell's files
            self._fail(cell.name, str(error))
            return
        self.say(f"{cell.name}: begins" + f", {', '.join(stages)} done before" * bool(stages))
        log = cell.folder / LOG
        size = log.stat().st_size if log.exists() else 0
        self.running[cell.name] = _PlayedCell(
            cell, self.start(cell, self.jobs), time.monotonic(), size
        )

    def collect_finished(self) -> None:
        for name, played in list(self.running.items()):
            exit_code = played.process.poll()
            if exit_code is None:
                continue
            del self.running[name]
            if exit_code:
                self._fail(name, _reason(played.cell.folder / LOG, played.log_from, exit_code))
            else:
                self.say(f"{name}: done in {time.monotonic() - played.since:.0f} s")

    def _fail(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        self.say(f"{name}: failed: {reason}")


class _ReusePlan:
    """Which cell reuses which stages of which other cell."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = list(cells)
        first_with_key: dict[str, Cell] = {}
        self.donors: dict[str, dict[str, Cell]] = {}
        """Cell -> stage -> the first cell that computes the same."""
        for cell in cells:
            keys = stage_keys(cell.recipe)
            self.donors[cell.name] = {
                stage: first_with_key[key] for stage, key in keys.items() if key in first_with_key
            }
            for key in keys.values():
                first_with_key.setdefault(key, cell)
        self._with_sft = {c.name for c in cells if c.recipe.sft is not None}

    def ready(self, cell: Cell, waiting: Set[str]) -> bool:
        """Whether the cell need not wait: no cell in `waiting` has still to compute a stage that it could reuse."""
        return all(
            donor.name not in waiting or _has(donor, stage)
            for stage, donor in self.donors[cell.name].items()
        )

    def copy_shared(self, cell: Cell) -> list[str]:
        """Copy the stages that other cells have computed into the cell's folder; returns them."""
        donor_folders = {
            stage: donor.folder
            for stage, donor in self.donors[cell.name].items()
            if _has(donor, stage)
        }
        if cell.name in self._with_sft and "sft" not in donor_folders:
            donor_folders = {
                stage: folder
                for stage, folder in donor_folders.items()
                if stage not in START_STAGES
            }
        with open_run(cell.folder, cell.recipe.dump()) as run:
            self._settle_dtype(cell, run)
            mine = dtype_of_run(cell.recipe, run)
            donors = {
                stage: folder
                for stage, folder in donor_folders.items()
                if dtype_of_run(cell.recipe, RunDir(folder)) == mine
            }
            return copy_stages(run, donors)

    def _settle_dtype(self, cell: Cell, run: RunDir) -> None:
        """Begin a cell in the dtype of the others with its model, whatever `auto` would be on this machine."""
        if dtype_of_run(cell.recipe, run) is not None:
            return
        for other in self.cells:
            if other.name != cell.name and other.recipe.model == cell.recipe.model:
                dtype = dtype_of_run(other.recipe, RunDir(other.folder))
                if dtype is not None:
                    run.same_inputs({DTYPE: dtype})
                    return


def describe_reuse(cells: Sequence[Cell]) -> list[str]:
    """One line per cell: which stages it would reuse from which other cell."""
    plan = _ReusePlan(cells)
    lines = []
    for cell in cells:
        by_donor: dict[str, list[str]] = {}
        for stage, donor in plan.donors[cell.name].items():
            by_donor.setdefault(donor.name, []).append(stage)
        reused = "; ".join(f"{', '.join(stages)} of {name}" for name, stages in by_donor.items())
        lines.append(f"{cell.name}" + f"  shares {reused}" * bool(reused))
    return lines


def _has(cell: Cell, stage: str) -> bool:
    number = 0 if stage in FIRST_ROUND_STAGES else -1
    folder = cell.folder / "rounds" / ("start" if number < 0 else f"{number:04d}")
    return RoundDir(folder, number).manifest(stage) is not None


def _is_played(cell: Cell) -> bool:
    """Whether the cell's run has ended; RunFolderError where the folder is another recipe's."""
    if not (cell.folder / "policy").is_dir():
        return False
    with open_run(cell.folder, cell.recipe.dump()) as run:
        return run.verify_published() is not None


def start_process(cell: Cell, jobs: int) -> subprocess.Popen[bytes]:
    """Start `prefloop run` of the cell's recipe in a process that ends with this one."""
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


def _terminate_all(processes: Sequence[Running]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            assert isinstance(process, subprocess.Popen)
            process.kill()


def _reason(log: Path, log_from: int, code: int) -> str:
    """Why a cell failed: its error message, the signal that ended it, or the last line of its log."""
    data = log.read_bytes()[log_from:] if log.exists() else b""
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    error_lines = [line for line in lines if line.startswith("prefloop: ")]
    if code < 0 and not error_lines:
        lines = [f"ended by signal {-code}"]
    last = (error_lines or lines or [f"exit code {code}, and no word"])[-1]
    return f"{last.removeprefix('prefloop: ')} (all it said is in {log})"
