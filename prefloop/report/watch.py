"""A run that is going on, followed from another terminal: what it said so far, and where it is now."""

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
_NO_COUNTS = ("time", "event", "round", "stage", "seconds")


def watch_run(folder: Path, console: Console, *, seconds: float = _SECONDS) -> None:
    """Print stages as they end, and on a terminal a line about the one that is on, until the run ends.

    Raises RunFolderError if `folder` is no run.
    """
    run = read_run(folder)
    now = _Now(run)
    said = 0
    with Status("", console=console) as status:
        while True:
            # Asked before the diary is read, so that a run's last words are not missed.
            going = is_running(folder)
            events = run.events()
            for event in events[said:]:
                for line in _lines(run, event):
                    console.print(Text(printable(line)), soft_wrap=True)
            said = len(events)
            if not going:
                break
            status.update(Text(printable(now.line())))
            time.sleep(seconds)
    console.print()
    show_rounds(run.results(), console)
    if not events or events[-1]["event"] != "end":
        end = f"\n{folder} is not running; the command that began it goes on with it"
        console.print(Text(end), soft_wrap=True)


def is_running(folder: Path) -> bool:
    """Whether a process plays this run: it holds the folder's lock."""
    try:
        lock = (folder / ".lock").open("rb")
    except FileNotFoundError:
        return False
    with lock:
        try:
            # Held for no longer than this, so that a run that begins right now finds it free.
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
            counts = {key: value for key, value in event.items() if key not in _NO_COUNTS}
            about = ""
            if event["stage"] == "evaluate":
                found = {result.round: result.measures for result in run.results()}
                about = glance(found.get(event["round"], {}))
            yield stage_line(event["round"], event["stage"], counts, event["seconds"], about)
        case "guard":
            yield f"round {event['round']}  guard       {event['sentence']}"
        case "end":
            yield f"ended    {event['time']}"


class _Now:
    """What a run is doing at this moment, read from what it has written so far."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        _, self._recipe = read_recipe(run)
        self._seen: tuple[str, int, float] | None = None
        """The stage in progress, how far it was when it was first seen, and when that was."""

    def line(self) -> str:
        """One line: "round 1  train  step 7 of 12, loss 0.94, 40 s left"."""
        places = [self._run.start, *self._run.rounds()]
        round_dir = next((place for place in reversed(places) if place.path.is_dir()), None)
        if round_dir is None:
            return "loading"
        for note in round_dir.path.glob("*.progress.json"):
            stage = note.name.removesuffix(".progress.json")
            # A run that was killed at a stage's very end leaves a note beside the manifest.
            if not round_dir.manifest(stage):
                return self._say(round_dir, stage, "chunk", _chunks(note), self._all_chunks(stage))
        if round_dir.manifest("pairs") and not round_dir.manifest("train"):
            loss = _last_loss(round_dir)
            line = self._say(
                round_dir, "train", "step", round_dir.steps(), self._all_steps(round_dir)
            )
            return f"{line}, loss {loss:.3f}" if loss is not None else line
        return f"round {round_name(round_dir.number)}"

    def _say(self, round_dir: RoundDir, stage: str, unit: str, done: int, total: int | None) -> str:
        name = f"{round_dir.number}/{stage}"
        if self._seen is None or self._seen[0] != name:
            self._seen = (name, done, time.monotonic())
        of = f" of {total}" if total else ""
        line = f"round {round_name(round_dir.number)}  {stage}  {unit} {done}{of}"
        _, before, since = self._seen
        if total and done > before:
            left = (time.monotonic() - since) / (done - before) * max(0, total - done)
            line += f", {duration(left)} left"
        return line

    def _all_chunks(self, stage: str) -> int | None:
        section = ("evaluate", "prompts") if stage in _HELD_OUT else ("loop", "prompts_per_round")
        prompts = self._recipe.get(section[0], {}).get(section[1])
        size = self._recipe.get("generate", {}).get("chunk_size")
        return math.ceil(prompts / size) if prompts and size else None

    def _all_steps(self, round_dir: RoundDir) -> int | None:
        train = self._recipe.get("train", {})
        size, epochs = int(train.get("batch_size") or 0), int(train.get("epochs", 1))
        if not size:
            return None
        pairs = round_dir.count("pairs")
        before = self._run.path / "rounds" / f"{round_dir.number - 1:04d}"
        if self._recipe.get("loop", {}).get("mix_previous") and before.is_dir():
            pairs += RoundDir(before, round_dir.number - 1).count("pairs")
        return math.ceil(pairs / size) * epochs


_HELD_OUT = ("answers", "introspection")


def _chunks(note: Path) -> int:
    try:
        return int(json.loads(note.read_text(encoding="utf-8"))["chunks"])
    except (OSError, ValueError, KeyError):
        # It is gone when the stage ends, which may be now.
        return 0


def _last_loss(round_dir: RoundDir) -> float | None:
    path = round_dir.train / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        return float(json.loads(lines[-1])["loss"]) if lines else None
    except (ValueError, KeyError):
        return None
