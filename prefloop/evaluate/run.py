"""`prefloop evaluate`: measure each subject, reuse results that still hold, compare the subjects.

    OUT/evaluation.json, .md, .tex             the report of the last call
    OUT/prompts-HASH.jsonl                     the held-out prompts of a run, for the measures to read
    OUT/kept/SUBJECT-HASH/MEASURE-HASH/        outcome.json, items.jsonl, and a measure's unfinished work

A hash covers all that decides the result: weights, options, files that options name, judge, seed, version, and
the measure's own code. A killed evaluation is continued; a changed one measures only what the change touches.
"""

from __future__ import annotations

import inspect
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from prefloop import __version__
from prefloop.data.prompts import DataOptions, read_prompts
from prefloop.data.rows import EMBEDDED
from prefloop.errors import DataError, PrefloopError, RecipeError
from prefloop.evaluate.cache import digest
from prefloop.evaluate.curves import curves
from prefloop.evaluate.judge import EvaluationJudge
from prefloop.evaluate.measures import Item, Measure, Subject
from prefloop.evaluate.significance import differences, holm
from prefloop.evaluate.subjects import (
    Source,
    content_hash,
    display_names,
    find_subject,
    open_subject,
    run_prompts,
)
from prefloop.evaluate.suites import ChosenMeasure, choose
from prefloop.machine import environment, keep_freed_memory
from prefloop.manifest import Manifest, write_atomically
from prefloop.records import Sampling, read_jsonl, write_jsonl
from prefloop.run_folder import alone_in

Say = Callable[[str], None]
LIMITS = ("limit", "items", "prompt_limit")
"""Names of the options by which measures limit their questions; `--limit` sets them all."""
LEVEL = 0.05
"""Significance level: a difference is significant where its adjusted p is below it."""


@dataclass(frozen=True)
class Options:
    """The arguments of `prefloop evaluate`."""

    subjects: Sequence[str]
    out: Path
    suite: str | None = None
    measures: Path | None = None
    overrides: Sequence[str] = ()
    judge: str | None = None
    policy: str | None = None
    """The model that stands for the policy where the judge asks one (self_judge)."""
    initial: str | None = None
    """The initial model of subjects that are models, not runs."""
    data: str | None = None
    limit: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    """Run code that comes with a run's model, where its recipe asks for it."""


def evaluate(options: Options, say: Say) -> dict[str, Any]:
    """Measure all subjects, write the report and return it; `say` prints progress. Raises PrefloopError."""
    keep_freed_memory()
    sources = [find_subject(text, trust=options.trust_remote_code) for text in options.subjects]
    subject_names = display_names(sources)
    if duplicate := next((name for name in subject_names if subject_names.count(name) > 1), None):
        raise RecipeError(f"{duplicate} is named twice; name each subject once")
    for source in (*sources, *([Source(options.initial)] if options.initial else ())):
        source.weights_hash()  # a model that is not there leaves no folder behind
    with alone_in(options.out, "evaluation"):
        prompts, prompts_label = _prompts(options, sources)
        limits = dict.fromkeys(LIMITS, options.limit) if options.limit else {}
        defaults = {"held_out": prompts, **limits}
        chosen = choose(options.suite, options.measures, options.overrides, defaults)
        available, unavailable = _checked(chosen)
        judge = EvaluationJudge.of(options.judge, options.policy, sources, prompts)
        report: dict[str, Any] = {
            "prefloop": __version__,
            "suite": options.suite,
            "prompts": prompts_label,
            "judge": judge.label,
            "seed": options.seed,
            "environment": environment(),
            "subjects": {},
        }
        items: dict[str, dict[str, tuple[Item, ...]]] = {}
        for name, source in zip(subject_names, sources, strict=True):
            subject_run = SubjectRun(options, name, source, judge, say)
            report["subjects"][name], items[name] = subject_run.measure(available, unavailable)
        report["comparisons"] = _comparisons(items, options.seed)
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(options.out / "evaluation.json", text + "\n")
    return report


def _checked(chosen: Sequence[ChosenMeasure]) -> tuple[list[ChosenMeasure], dict[str, str]]:
    """Measures that can run, and why the others cannot; raises where one of the others was named by the user."""
    available, unavailable = [], {}
    for choice in chosen:
        try:
            choice.measure.check()
        except PrefloopError as error:
            if choice.by_name:
                raise type(error)(f"{choice.name}: {error}") from error
            unavailable[choice.name] = str(error)
        else:
            available.append(choice)
    return available, unavailable


class SubjectRun:
    """One subject's measures, run or read from the cache."""

    def __init__(
        self, options: Options, name: str, source: Source, judge: EvaluationJudge, say: Say
    ) -> None:
        self.options = options
        self.name = name
        self.source = source
        self.judge = judge
        self.say = say
        self.weights = source.weights_hash()
        self.initial = source.initial_hash() or (
            Source(options.initial).weights_hash() if options.initial else None
        )
        self.folder = options.out / "kept" / f"{_slug(name)}-{self.weights[:12]}"
        self._folders: dict[str, Path] = {}

    def measure(
        self, available: Sequence[ChosenMeasure], unavailable: Mapping[str, str]
    ) -> tuple[dict[str, Any], dict[str, tuple[Item, ...]]]:
        """The subject's section of the report, and the items of each measure."""
        skipped, todo = dict(unavailable), [self._with_own_run(choice) for choice in available]
        done: dict[str, dict[str, Any]] = {}
        for choice in todo:
            if (outcome := self._read_outcome(choice)) is not None:
                done[choice.name] = outcome
        if missing := [choice for choice in todo if choice.name not in done]:
            with open_subject(self.source, self.options.initial) as model:
                subjects = {choice.name: self._subject(choice, model) for choice in missing}
                for (
                    choice
                ) in missing:  # all of them before the first one runs, which may last hours
                    if (lacks := choice.measure.lacks(subjects[choice.name])) is not None:
                        if choice.by_name:
                            raise RecipeError(f"{choice.name}: {lacks}")
                        skipped[choice.name] = lacks
                for choice in missing:
                    if choice.name not in skipped:
                        done[choice.name] = self._run_measure(choice, subjects[choice.name])
        part = {
            "source": self.source.text,
            "weights": self.weights,
            "initial": self.initial,
            "measures": {choice.name: done[choice.name] for choice in todo if choice.name in done},
            "skipped": skipped,
            "curves": curves(self.source.run) if self.source.run else None,
        }
        items = {
            choice.name: tuple(read_jsonl(self._measure_folder(choice) / "items.jsonl", Item))
            for choice in todo
            if choice.name in done
        }
        return part, items

    def _with_own_run(self, choice: ChosenMeasure) -> ChosenMeasure:
        """The measure with its option `of` set to the subject's own run, where it has one that is not set."""
        run = self.source.run
        if run is None or getattr(choice.measure, "of", "") is not None:
            return choice
        bound = choice.measure.model_copy(update={"of": str(run.path)})
        return ChosenMeasure(choice.name, bound, choice.by_name)

    def _subject(self, choice: ChosenMeasure, model: Any) -> Subject:
        return Subject(
            name=self.name,
            engine=model.engine,
            initial=model.initial,
            model=model.model,
            tokenizer=model.tokenizer,
            judge=self.judge.opened if _asks_judge(choice.measure) else None,
            folder=self._measure_folder(choice) / "on-its-way",
            seed=self.options.seed,
            answers=self.folder / f"answers-{__version__}",
        )

    def _run_measure(self, choice: ChosenMeasure, subject: Subject) -> dict[str, Any]:
        """Run the measure, store its outcome, and return its section of the report."""
        for folder in (subject.folder, subject.answers):
            assert folder is not None
            folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        outcome = choice.measure.run(subject)
        seconds = round(time.perf_counter() - start, 1)
        measure_folder = self._measure_folder(choice)
        part = measure_folder / "items.part"
        write_jsonl(part, outcome.items)
        part.replace(measure_folder / "items.jsonl")
        row = {
            "options": choice.measure.model_dump(mode="json"),
            "better": dict(choice.measure.better),
            "estimates": {name: asdict(estimate) for name, estimate in outcome.estimates.items()},
            "items": len(outcome.items),
            "facts": dict(outcome.facts or {}),
            "seconds": seconds,
        }
        json.dumps(row, allow_nan=False)  # ValueError: a measure's bug must not be cached
        self._outcome(choice).write(row, [measure_folder / "items.jsonl"])
        # Unfinished work may hold texts that the result leaves out on purpose.
        shutil.rmtree(subject.folder)
        self.say(f"{self.name}  {choice.name}  {seconds:.1f} s")
        return {**row, "kept_from_before": False}

    def _read_outcome(self, choice: ChosenMeasure) -> dict[str, Any] | None:
        row = self._outcome(choice).verify()
        if row is None:
            return None
        del row["files"]
        return {**row, "kept_from_before": True}

    def _outcome(self, choice: ChosenMeasure) -> Manifest:
        folder = self._measure_folder(choice)
        remedy = f"delete {folder}, and the same command measures it again"
        return Manifest(folder / "outcome.json", remedy)

    def _measure_folder(self, choice: ChosenMeasure) -> Path:
        # Named once: a file that changes meanwhile must not change the folder's name.
        if choice.name not in self._folders:
            self._folders[choice.name] = (
                self.folder / f"{_slug(choice.name)}-{self._key(choice)[:12]}"
            )
        return self._folders[choice.name]

    def _key(self, choice: ChosenMeasure) -> str:
        options = {
            # A stop sequence is text, even where a file of that name exists.
            name: value
            if isinstance(getattr(choice.measure, name), Sampling)
            else _with_contents(value)
            for name, value in choice.measure.model_dump(mode="json").items()
        }
        # The code that measures share counts as well as the measure's own file.
        shared_files = sorted(Path(__file__).parent.glob("*.py"))
        code_hashes = [
            content_hash(file)
            for file in (*shared_files, Path(inspect.getfile(type(choice.measure))))
        ]
        return digest(
            choice.name,
            options,
            choice.measure.reads(),
            self.initial,
            self.judge.key if _asks_judge(choice.measure) else None,
            self.options.seed,
            __version__,
            code_hashes,
        )


def _asks_judge(measure: Measure) -> bool:
    return measure.needs_judge or measure.asks_judge


def _with_contents(value: Any) -> Any:
    """The options with each path replaced by a hash of the file or folder there."""
    if isinstance(value, Mapping):
        return {key: _with_contents(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_contents(inner) for inner in value]
    if isinstance(value, str) and value:
        try:
            path = Path(value).expanduser()
            if (path / "recipe.yaml").is_file():  # a run: only its recipe matters here
                return content_hash(path / "recipe.yaml")
            if path.exists():
                return content_hash(path)
        except (OSError, RuntimeError):  # no path: too long, or an unknown home folder
            pass
    return value


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[-60:]


def _prompts(options: Options, sources: Sequence[Source]) -> tuple[str, str]:
    """The source of the measures' prompts (a path or name), and its description for the report."""
    if options.data is not None:
        next(read_prompts(options.data, DataOptions(), part="eval"), None)  # raises early
        return options.data, options.data
    prompts_by_run = {
        str(source.run.path): prompts
        for source in sources
        if source.run and (prompts := run_prompts(source))
    }
    for (first, first_prompts), (other, other_prompts) in pairwise(prompts_by_run.items()):
        if first_prompts != other_prompts:
            raise DataError(
                f"{first} and {other} hold out different prompts; name prompts for both with --data"
            )
    if not prompts_by_run:
        return EMBEDDED, EMBEDDED
    first, prompts = next(iter(prompts_by_run.items()))
    rows = [
        json.dumps(
            {
                "id": prompt.id,
                "messages": [turn.model_dump() for turn in prompt.messages],
                "response": prompt.target,
            },
            ensure_ascii=False,
        )
        for prompt in prompts
    ]
    path = options.out / f"prompts-{digest(rows)[:12]}.jsonl"
    write_atomically(path, "\n".join(rows) + "\n")
    return str(path), f"held out by {first}"


def _comparisons(
    items: Mapping[str, Mapping[str, Sequence[Item]]], seed: int
) -> list[dict[str, Any]]:
    """Each subject against the first, on the items that both have; p adjusted for all of them together."""
    (first, first_items), *others = items.items()
    rows: list[dict[str, Any]] = []
    for name, other_items in others:
        for measure in (measure for measure in first_items if measure in other_items):
            for difference in differences(first_items[measure], other_items[measure], seed=seed):
                rows.append(
                    {
                        "measure": measure,
                        "metric": difference.metric,
                        "subject": name,
                        "against": first,
                        "difference": asdict(difference.estimate),
                        "p": difference.p,
                    }
                )
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row |= {"p_holm": adjusted, "significant": adjusted < LEVEL}
    return rows
