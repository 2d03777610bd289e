"""What a finished run no longer needs: weights that no resume, evaluation or export of its policy reads.

New log-ratios do (`prefloop report --logratios`); those that lie in the run's folder stay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefloop.errors import RunFolderError
from prefloop.run_folder import RoundDir, RunDir, alone_in, read_run


@dataclass(frozen=True)
class Disposable:
    """Files of one round that can go."""

    round_dir: RoundDir
    files: tuple[Path, ...]
    size: int
    """Bytes."""
    what: str
    """In words."""


def disposable(run: RunDir) -> list[Disposable]:
    """What could be freed, round by round. RunFolderError where the run has not ended, or a round has changed.

    Kept are the recommended policy, its round's (from which the run's own command publishes it again), a fine-tuned
    start, and all records. What goes are the policies of the other rounds and the tensors of all trainings.
    """
    published = run.published.verify()
    if published is None:
        raise RunFolderError(
            f"{run.path} has not ended, and a round's weights are the next one's start (train.keep_last frees "
            f"rounds on the way); {run.to_finish()}"
        )
    found = []
    for round_dir in run.rounds():
        round_dir.manifest("train")
        is_kept = round_dir.number == published["round"]
        files = tuple(round_dir.weights(policy=not is_kept))
        if files:
            what = "training state" if is_kept else "policy and training state"
            size = sum(path.stat().st_size for path in files)
            found.append(Disposable(round_dir, files, size, what))
    return found


def clean_run(folder: Path, *, apply: bool = False) -> list[Disposable]:
    """What a finished run no longer needs; deleted with `apply`. RunFolderError as above, or where it is in use."""
    run = read_run(folder)
    if not apply:
        return disposable(run)
    with alone_in(folder, "process"):
        found = disposable(run)
        for part in found:
            part.round_dir.free(part.files)
        if found:
            run.event("clean", bytes=sum(part.size for part in found))
    return found
