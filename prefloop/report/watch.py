"""`prefloop watch`: follow a run from another terminal: its finished stages, and its progress now."""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from prefloop.report.console import duration, glance, round_name, show_rounds, stage_line
from prefloop.report.facts import read_recipe
from prefloop.report.formats import printable
from prefloop.run_folder import RoundDir, RunDir, read_run

_SECONDS = 1.0
_NOT_COUNTS = ("time", "event", "round", "stage", "seconds")


def watch_run(folder: Path, console: Console, *, seconds: float = _SECONDS) -> None:
    """Print stages as they end, and on a terminal the progress of the current one, until the run ends.

    Raises RunFolderError if `folder` is no run.
    """
    run = read_run(folder)
    progress = _Progress(run)
    printed = 0
    with Status("", console=console) as status:
        while True:
            # Checked before the events are read, so that the last ones are not missed.
            running = is_running(folder)
            events = run.events()
            for event in events[printed:]:
                for line in _lines(run, event):
                    console.print(Text(printable(line)), soft_wrap=True)
            printed = len(events)
            if not running:
                break
            status.update(Text(printable(progress.line())))
            time.sleep(seconds)
    console.print()
    show_rounds(run.results(), console)
    if not events or events[-1]["event"] != "end":
        message = f"\n{folder} is not running; the command that began it goes on with it"
        console.print(Text(message), soft_wrap=True)


def is_running(folder: Path) -> bool:
    """Whether a process is playing this run, that is, holds the folder's lock."""
    try:
        lock = (folder / ".lock").open("rb")
    except FileNotFoundError:
        return False
    with lock:
        try:
            # Released at once, so that a run that starts now gets it.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(lock, fcntl.LOCK_UN)
    return False


def _lines(run: RunDir, event: dict[str, Any]) -> Iterator[str]:
    match event["event"]:
        case "begin":
            yield f"begun    {event['time']}"
        case "stage":
            counts = {key: value for key, value in event.items() if key not in _NOT_COUNTS}
            about = ""
            if event["stage"] == "evaluate":
                measures_by_round = {result.round: result.measures for result in run.results()}
                about = glance(measures_by_round.get(event["round"], {}))
            yield stage_line(event["round"], event["stage"], counts, event["seconds"], about)
        case "guard":
            yield f"round {event['round']}  guard       {event['sentence']}"
        case "stop":
            yield f"stopped  {event['sentence']}"
        case "end":
            yield f"ended    {event['time']}"


class _Progress:
    """A run's current progress, read from the files it has written so far."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        _, self._recipe = read_recipe(run)
        self._first_seen: tuple[str, int, float] | None = None
        """The current stage, its progress when first seen, and the time of that."""

    def line(self) -> str:
        """One line: "round 1  train  step 7 of 12, loss 0.94, 40 s left"."""
        round_dirs = [self._run.start, *self._run.rounds()]
        round_dir = next(
            (candidate for candidate in reversed(round_dirs) if candidate.path.is_dir()), None
        )
        if round_dir is None:
            return "loading"
        for note in round_dir.path.glob("*.progress.json"):
            stage = note.name.removesuffix(".progress.json")
            # A run killed at the very end of a stage leaves its progress file beside the manifest.
            if not round_dir.manifest(stage):
                return self._stage_progress(
                    round_dir, stage, "chunk", _chunks(note), self._chunk_count(stage)
                )
        if round_dir.manifest("pairs") and not round_dir.manifest("train"):
            loss = _last_loss(round_dir)
            line = self._stage_progress(
                round_dir, "train", "step", round_dir.steps(), self._step_count(round_dir)
            )
            return f"{line}, loss {loss:.3f}" if loss is not None else line
        return f"round {round_name(round_dir.number)}"

    def _stage_progress(
        self, round_dir: RoundDir, stage: str, unit: str, done: int, total: int | None
    ) -> str:
        name = f"{round_dir.number}/{stage}"
        if self._first_seen is None or self._first_seen[0] != name:
            self._first_seen = (name, done, time.monotonic())
        of_total = f" of {total}" if total else ""
        line = f"round {round_name(round_dir.number)}  {stage}  {unit} {done}{of_total}"
        _, before, since = self._first_seen
        if total and done > before:
            seconds_left = (time.monotonic() - since) / (done - before) * max(0, total - done)
            line += f", {duration(seconds_left)} left"
        return line

    def _chunk_count(self, stage: str) -> int | None:
        section = (
            ("evaluate", "prompts") if stage in _HELD_OUT_STAGES else ("loop", "prompts_per_round")
        )
        prompts = self._recipe.get(section[0], {}).get(section[1])
        size = self._recipe.get("generate", {}).get("chunk_size")
        return math.ceil(prompts / size) if prompts and size else None

    def _step_count(self, round_dir: RoundDir) -> int | None:
        train = self._recipe.get("train", {})
        size, epochs = int(train.get("batch_size") or 0), int(train.get("epochs", 1))
        if not size:
            return None
        pairs = round_dir.count("pairs")
        before = self._run.path / "rounds" / f"{round_dir.number - 1:04d}"
        if self._recipe.get("loop", {}).get("mix_previous") and before.is_dir():
            pairs += RoundDir(before, round_dir.number - 1).count("pairs")
        return math.ceil(pairs / size) * epochs


_HELD_OUT_STAGES = ("answers", "introspection")


def _chunks(note: Path) -> int:
    try:
        return int(json.loads(note.read_text(encoding="utf-8"))["chunks"])
    except (OSError, ValueError, KeyError):
        # The file is deleted when the stage ends, which may be now.
        return 0


def _last_loss(round_dir: RoundDir) -> float | None:
    path = round_dir.train / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        return float(json.loads(lines[-1])["loss"]) if lines else None
    except (ValueError, KeyError):
        return None
