"""A whole run compared with its manifests, and damaged stages taken out so that the run makes them again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prefloop.errors import RunFolderError
from prefloop.run_folder import RoundDir, RunDir, alone_in, read_run

STAGES = ("sft", "candidates", "ranked", "pairs", "train", "answers", "introspection", "result")
"""In the order in which one is made from the others."""


@dataclass
class Verification:
    """How many stages are as they were written, which are damaged, and which were taken out."""

    stages: int = 0
    """Stages whose files are as they were written."""
    damaged: list[str] = field(default_factory=list)
    """One sentence for each damaged file or stage."""
    redone: list[str] = field(default_factory=list)
    """Stages that were taken out."""


def verify_run(folder: Path, *, redo: bool = False) -> Verification:
    """Compare size and content of every file that a finished stage of the run left.

    Raises RunFolderError where `folder` is no run or, with `redo`, in use.
    """
    if not redo:
        return _verified(read_run(folder), redo)
    run = read_run(folder)
    with alone_in(folder, "process"):
        return _verified(run, redo)


def _verified(run: RunDir, redo: bool) -> Verification:
    report = Verification()
    for round_dir in (run.start, *run.rounds()):
        for stage in STAGES:
            _verify_stage(round_dir, stage, report, redo)
    events = run.events()
    if damaged := sum(event["event"] == "damaged" for event in events):
        report.damaged.append(
            f"{run.path}/events.jsonl has {damaged} damaged lines; the command that began the run sets them apart"
        )
    try:
        report.stages += run.published.verify() is not None
    except RunFolderError as error:
        report.damaged.append(str(error))
        if redo:
            run.published.path.unlink()
            report.redone.append("policy")
    return report


def _verify_stage(round_dir: RoundDir, stage: str, report: Verification, redo: bool) -> None:
    note = round_dir.path / f"{stage}.progress.json"
    try:
        if round_dir.verify(stage) is not None:
            report.stages += 1
        elif note.exists():
            round_dir.verify_begun(stage)
    except RunFolderError as error:
        report.damaged.append(str(error))
        if redo:
            round_dir.drop(stage)
            report.redone.append(f"{stage} of {round_dir.path}")
