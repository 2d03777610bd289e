"""A run in experiment trackers: its steps, a table of its rounds, its pairs and its report.

A tracker that cannot be opened stops the run before it begins. One that fails later is left out with a warning:
what it shows lies in the run's folder as well.
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from prefloop.errors import RecipeError
from prefloop.manifest import write_atomically
from prefloop.recipe import Recipe
from prefloop.records import Pair, RoundResult, read_json
from prefloop.report.console import format_values, measure_names, round_name
from prefloop.report.formats import markdown_table, visible
from prefloop.report.meanings import round_meaning
from prefloop.report.model_card import without_paths

log = logging.getLogger(__name__)

NOTE = "tracking.json"
"""Which run of the trackers goes on, when this one does."""
_COLUMNS = ("id", "round", "prompt", "chosen", "rejected", "target", "margin")

Rows = list[list[Any]]


class Trackers:
    """The trackers of one run; without any, everything here does nothing."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe = recipe
        self._folder = folder
        self._open: list[Any] = []
        self._known: dict[str, Any] = {}
        self._without_tables: set[str] = set()

    @property
    def any_open(self) -> bool:
        """Whether there is a tracker to tell."""
        return bool(self._open)

    def open(self) -> None:
        """Open those that the recipe names, where a run was begun before its own run there. Raises RecipeError."""
        options = self._recipe.track
        if not options.report_to:
            return
        from accelerate import PartialState

        PartialState(cpu=self._recipe.model.device == "cpu")
        note = self._folder / NOTE
        known = read_json(note) if note.exists() else {"id": uuid.uuid4().hex[:8]}
        self._known = known
        for name in options.report_to:
            try:
                self._open.append(self._opened(name, known, first=not note.exists()))
            except Exception as error:
                raise RecipeError(
                    f"track.report_to {name} cannot be opened ({_one_line(error)}); mend that, or leave it out"
                ) from error
        for tracker in self._open:
            if tracker.name == "mlflow":
                known["mlflow"] = tracker.tracker.info.run_id
        self._write_note()

    def _write_note(self) -> None:
        write_atomically(self._folder / NOTE, json.dumps(self._known) + "\n")

    def _opened(self, name: str, known: Mapping[str, Any], *, first: bool) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        options = self._recipe.track
        kind = LOGGER_TYPE_TO_CLASS[name]
        run_name = options.run_name or self._recipe.name
        keywords: dict[str, dict[str, Any]] = {
            "wandb": {
                "name": run_name,
                "id": known["id"],
                "resume": "allow",
                "dir": str(self._folder),
            },
            "trackio": {"name": run_name, "resume": "allow"},
            "mlflow": {"run_name": run_name, "run_id": known.get("mlflow")},
        }
        place = [str(self._folder)] if kind.requires_logging_directory else []
        tracker = kind(options.project, *place, **keywords.get(name, {}))
        tracker.start()
        if first:
            tracker.store_init_configuration(
                _flat(without_paths(self._recipe.model_dump(mode="json")))
            )
        return tracker

    def step(self, row: Mapping[str, Any], step: int) -> None:
        """One optimiser step's metrics, as train/loss and so on."""
        self._tell(lambda tracker: tracker.log(_numbers("train", row), step=step))

    def round(self, results: Sequence[RoundResult], pairs: Iterable[Pair], step: int) -> None:
        """The last result's measures as eval/..., a table of all rounds until then, and the round's pairs."""
        number = results[-1].round
        if number <= self._known.get("told", -2):  # told before the run was stopped
            return
        measures = {k: v for k, v in results[-1].measures.items() if not k.startswith("train_")}
        values = {"round": number, **measures}
        self._tell(lambda tracker: tracker.log(_numbers("eval", values), step=step))
        head, rows = _round_table(results)
        self._table("rounds", head, rows, step)
        shown = list(islice(pairs, self._recipe.track.pairs))
        if shown:
            self._table(f"pairs/round_{number}", list(_COLUMNS), list(_rows(shown)), step)
        self._known["told"] = number
        self._write_note()

    def report(self, page: Path) -> None:
        """Attach the report, where the tracker keeps files or pages."""
        for tracker in list(self._open):
            if attach := _ATTACHING.get(tracker.name):
                self._extra(tracker, "the report", partial(attach, tracker, page))

    def close(self) -> None:
        """End the run there."""
        self._tell(lambda tracker: tracker.finish())
        self._open.clear()

    def _table(self, name: str, head: list[str], rows: Rows, step: int) -> None:
        for tracker in list(self._open):
            write = _TABLES.get(tracker.name) or (
                _log_table if hasattr(tracker, "log_table") else None
            )
            if write is not None and tracker.name not in self._without_tables:
                self._extra(tracker, "tables", partial(write, tracker, name, head, rows, step))

    def _extra(self, tracker: Any, what: str, call: Callable[[], None]) -> None:
        """What a tracker may fail at without losing the rest."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a tracker's fault must not end hours of work
            self._without_tables.add(tracker.name)
            log.warning("tracker %s does not take %s (%s)", tracker.name, what, _one_line(error))

    def _tell(self, call: Callable[[Any], None]) -> None:
        for tracker in list(self._open):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 - a tracker's fault must not end hours of work
                self._open.remove(tracker)
                log.warning(
                    "tracker %s failed and gets no more of this run (%s); all of it is in %s",
                    tracker.name,
                    _one_line(error),
                    self._folder,
                )


def _round_table(results: Sequence[RoundResult]) -> tuple[list[str], Rows]:
    """A row a measure, a column a round, and the measure in words."""
    head = ["measure", *(round_name(result.round) for result in results), "in words"]
    rows: Rows = [
        [
            name,
            *format_values([result.measures.get(name) for result in results]),
            round_meaning(name).words,
        ]
        for name in measure_names(results)
    ]
    return head, rows


def _rows(pairs: Sequence[Pair]) -> Iterator[list[Any]]:
    for pair in pairs:
        prompt = "\n\n".join(f"{turn.role}: {turn.content}" for turn in pair.prompt)
        texts = (prompt, pair.chosen, pair.rejected, pair.target or "")
        yield [pair.id, pair.round, *map(visible, texts), pair.margin]


def _numbers(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{group}/{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their full names, as numbers and texts."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner if isinstance(inner, bool | int | float) else str(inner)
    return flat


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# What single trackers take besides numbers.


def _log_table(tracker: Any, name: str, head: list[str], rows: Rows, step: int) -> None:
    tracker.log_table(name, columns=head, data=rows, step=step)


def _tensorboard_table(tracker: Any, name: str, head: list[str], rows: Rows, step: int) -> None:
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    tracker.tracker.add_text(name, markdown_table(head, cells, texts=1), step)


def _mlflow_table(tracker: Any, name: str, head: list[str], rows: Rows, step: int) -> None:
    import mlflow

    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    mlflow.log_text(markdown_table(head, cells, texts=1), f"{name}.md")


def _trackio_table(tracker: Any, name: str, head: list[str], rows: Rows, step: int) -> None:
    import pandas
    import trackio

    frame = pandas.DataFrame(rows, columns=head)
    tracker.tracker.log({name: trackio.Table(dataframe=frame)}, step=step)


_TABLES: dict[str, Callable[[Any, str, list[str], Rows, int], None]] = {
    "tensorboard": _tensorboard_table,
    "mlflow": _mlflow_table,
    "trackio": _trackio_table,
}


def _wandb_report(tracker: Any, page: Path) -> None:
    import wandb

    tracker.tracker.log({"report": wandb.Html(str(page), inject=False)})


def _mlflow_report(tracker: Any, page: Path) -> None:
    tracker.log_artifact(str(page))


_ATTACHING: dict[str, Callable[[Any, Path], None]] = {
    "wandb": _wandb_report,
    "mlflow": _mlflow_report,
}
