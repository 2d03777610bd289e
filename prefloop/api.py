"""The library's public functions: play a recipe, measure policies, look into a run. docs/python.md shows them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefloop.data.export import as_row
from prefloop.errors import RunFolderError
from prefloop.recipe import Recipe, load_recipe
from prefloop.records import Candidates, Pair, Record, Reject, RoundResult
from prefloop.run_folder import RoundDir, read_run

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

R = TypeVar("R", bound=Record)
log = logging.getLogger(__name__)


def run(
    recipe: Recipe | str | Path,
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    accept_changes: bool = False,
) -> Run:
    """Play a recipe's closed loop, and open its folder; the same call goes on with a run that was stopped.

    `recipe` is an object, a file, or the name of a shipped one, `overrides` as in `load_recipe`; `folder` is
    runs/NAME unless it is given. A line is printed for each stage unless `quiet`. With `accept_changes` a run
    goes on although its model, data or versions are no longer those of its start. Raises PrefloopError.
    """
    from rich.console import Console

    from prefloop.recipe.check import check_recipe
    from prefloop.run.loop import run as play

    if isinstance(recipe, Recipe):
        if overrides:
            raise TypeError("overrides belong to a recipe's name or file; this one is loaded")
    else:
        recipe = load_recipe(str(recipe), overrides)
    for note in check_recipe(recipe):
        log.warning("%s", note)
    place = Path(folder) if folder is not None else Path("runs") / recipe.name
    outcome = play(
        recipe, place, Console(highlight=False, quiet=quiet), accept_changes=accept_changes
    )
    # It draws: matplotlib is not waited for before the first round.
    from prefloop.report.html import write_report

    write_report([outcome.folder], outcome.folder / "report.html")
    return Run(outcome.folder)


def evaluate(  # noqa: PLR0913
    *subjects: str | Path | Run,
    out: str | Path = "evaluations",
    suite: str | None = None,
    measures: str | Path | None = None,
    overrides: Sequence[str] = (),
    judge: str | None = None,
    policy: str | None = None,
    initial: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure models and runs' policies and compare them with the first; what is known from before is read.

    A subject is a model, a run, or "RUN@ROUND" ("RUN@start"). Options are those of `prefloop evaluate`. Returns
    what OUT/evaluation.json holds: `subjects` with their `measures`, and `comparisons`. Raises PrefloopError.
    """
    from prefloop.evaluate.run import Options
    from prefloop.evaluate.run import evaluate as measure
    from prefloop.report.evaluation import write_tables

    options = Options(
        subjects=[str(one.folder if isinstance(one, Run) else one) for one in subjects],
        out=Path(out),
        suite=suite,
        measures=None if measures is None else Path(measures),
        overrides=overrides,
        judge=judge,
        policy=policy,
        initial=initial,
        data=data,
        limit=limit,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    report = measure(options, (lambda line: None) if quiet else print)
    write_tables(report, Path(out))
    return report


class Records(list[R]):
    """A list of a run's records that becomes a table where one is wanted."""

    def __init__(
        self, records: Iterable[R], row: Callable[[R], dict[str, Any]] | None = None
    ) -> None:
        """`row` makes a data set's row of a record; without one it is all its fields."""
        super().__init__(records)
        self._row = row or _fields

    def to_pandas(self) -> DataFrame:
        """A pandas DataFrame, one row a record, one column a field; of measures, one column a measure."""
        import pandas as pd

        flat = _measured if all(isinstance(record, RoundResult) for record in self) else _fields
        return pd.DataFrame([flat(record) for record in self])

    def to_dataset(self) -> Dataset:
        """A Hugging Face Dataset; of pairs, the columns that `prefloop export` writes and TRL trains on."""
        from datasets import Dataset

        return Dataset.from_list([self._row(record) for record in self])


class Run:
    """A run's folder, finished or not, to look into. Lists are read when they are asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Raises RunFolderError where the folder is no run's."""
        self._files = read_run(Path(folder).absolute())

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, rounds={self.rounds})"

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._files.path

    @property
    def recipe(self) -> Recipe:
        """The recipe that it was started with, every value resolved."""
        return load_recipe(str(self.folder / "recipe.yaml"))

    @property
    def policy(self) -> Path:
        """The folder of the policy that it recommends. Raises RunFolderError before the run's end."""
        if not (self.folder / "policy").is_dir():
            raise RunFolderError(f"{self.folder} has no policy; {self._files.to_finish()}")
        return self.folder / "policy"

    @property
    def rounds(self) -> list[int]:
        """Numbers of the rounds that have made their pairs."""
        return [folder.number for folder in self._files.rounds() if folder.manifest("pairs")]

    def pairs(self, round: int | None = None) -> Records[Pair]:
        """Training pairs of one round, or of all."""
        return Records(self._read("pairs", Pair, round), as_row)

    def candidates(self, round: int | None = None) -> Records[Candidates]:
        """All that was generated for each prompt, with the scores of the round's ranking."""
        return Records(self._read("ranked", Candidates, round))

    def rejects(self, round: int | None = None) -> Records[Reject]:
        """Prompts that gave no pair, and why."""
        return Records(reject for folder in self._rounds(round) for reject in folder.rejects())

    def measures(self) -> Records[RoundResult]:
        """Measures of the start (round -1) and of every round that was measured."""
        return Records(self._files.results(), _measured)

    def _read(self, stage: str, kind: type[R], round: int | None) -> list[R]:
        return [record for folder in self._rounds(round) for record in folder.stream(stage, kind)]

    def _rounds(self, round: int | None) -> list[RoundDir]:
        folders = [folder for folder in self._files.rounds() if folder.manifest("pairs")]
        if round is None:
            return folders
        found = [folder for folder in folders if folder.number == round]
        if not found:
            raise RunFolderError(
                f"{self.folder} has no pairs of round {round}; it has those of {self.rounds}"
            )
        return found


def _fields(record: Record) -> dict[str, Any]:
    return record.model_dump(mode="json")


def _measured(record: Record) -> dict[str, Any]:
    assert isinstance(record, RoundResult)
    return {"round": record.round, **record.measures}
