"""One of the processes in which a stage runs: `python -m prefloop.run.worker RUN ROUND STAGE FOLDER`.

Launchers start it, and `prefloop run` starts them (launch.py). It reads the run's recipe and records and
leaves what the stage leaves in one process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefloop.errors import PrefloopError
from prefloop.manifest import write_atomically
from prefloop.run.launch import Stage, end_with_parent, working_in
from prefloop.run_folder import RunDir

_TERMINATED = 128 + signal.SIGTERM


class _Quiet(RunDir):
    """The run's folder as a worker sees it: the run's diary is its parent's."""

    def event(self, kind: str, **facts: Any) -> None:
        """Ignored: the parent process writes the diary."""

    def same_inputs(
        self, identities: Mapping[str, str | int], *, decisive: bool = True
    ) -> list[str]:
        """The parent has compared them."""
        return []


def main() -> None:
    """Do the stage; exit with 2 for an error that is the user's to mend."""
    run, number, name, folder = sys.argv[1:]
    stage = Stage(Path(run), int(number), name, Path(folder))
    rank = _rank()
    _speak_into(stage.notes / f"rank-{rank}.log")
    note = stage.notes / f"rank-{rank}.json"
    _end_when_told(note)
    with working_in(stage.run):
        try:
            facts = _work(stage)
        except PrefloopError as error:
            _leave(note, "user error", str(error))
            # Without the interpreter's farewell, which may wait for processes that wait for this one.
            os._exit(2)
        except Exception as error:
            _leave(note, "error", f"{type(error).__name__}: {error}")
            raise
        if rank == 0:
            write_atomically(stage.notes / "facts.json", json.dumps(facts))
        _leave(note, "done", "")


def _work(stage: Stage) -> dict[str, Any]:
    import torch

    from prefloop.recipe import load_recipe
    from prefloop.recipe.options import TrackOptions
    from prefloop.run.loop import make_worker_chunks
    from prefloop.run.session import Session
    from prefloop.train.placement import is_sharded

    torch.set_num_threads(_threads())
    # transformers would load weights in one process only; we cut them up where they are whole.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    recipe = load_recipe(str(stage.run / "recipe.yaml")).model_copy(
        update={"launch": None, "track": TrackOptions()}
    )
    rundir = _Quiet(stage.run)
    if stage.name not in ("sft", "train"):
        make_worker_chunks(
            recipe, rundir, stage.round, stage.name, _rank(), int(os.environ["WORLD_SIZE"])
        )
        return {}
    session = Session(recipe, rundir, on_cpu=is_sharded())
    round_dir = rundir.round(stage.round)
    facts = session.supervise(round_dir) if stage.name == "sft" else session.train(round_dir)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return facts


def _rank() -> int:
    return int(os.environ["RANK"])


def _threads() -> int:
    """This process's share of the cores, unless the user has said otherwise."""
    if wanted := os.environ.get("PREFLOOP_THREADS"):
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _speak_into(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def _end_when_told(note: Path) -> None:
    """On SIGTERM leave a note and go, even while the main thread waits for another process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        try:
            _leave(note, "terminated", "")
        finally:
            os._exit(_TERMINATED)

    threading.Thread(target=wait, daemon=True).start()
    end_with_parent()


def _leave(note: Path, ended: str, says: str) -> None:
    if not note.exists():
        write_atomically(note, json.dumps({"ended": ended, "says": says, "time": time.time()}))


if __name__ == "__main__":
    main()
