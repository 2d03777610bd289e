"""`prefloop evaluate`: subjects opened one by one, measured, compared; what is measured already is read.

    OUT/evaluation.json, .md, .tex             the report of the last call
    OUT/prompts-HASH.jsonl                     prompts that came from a run, as measures read them
    OUT/kept/SUBJECT-HASH/MEASURE-HASH/        outcome.json, items.jsonl, and what a measure keeps on its way

A hash is of all that decides the result: weights, options, files that options name, judge, seed, version, and
the measure's own code. A killed evaluation goes on, and a changed one reads what is still true.
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

import prefloop.evaluate
from prefloop import __version__
from prefloop.data.prompts import DataOptions, read_prompts
from prefloop.data.rows import EMBEDDED
from prefloop.errors import DataError, PrefloopError, RecipeError
from prefloop.evaluate.cache import digest
from prefloop.evaluate.curves import curves
from prefloop.evaluate.judge import EvaluationJudge
from prefloop.evaluate.measures import Item, Measure, Subject
from prefloop.evaluate.significance import differences, holm
from prefloop.evaluate.subjects import Source, contents, find, held_out, names, opened
from prefloop.evaluate.suites import Chosen, choose
from prefloop.machine import environment, keep_freed_memory
from prefloop.manifest import Manifest, write_atomically
from prefloop.records import Sampling, read_jsonl, write_jsonl
from prefloop.run_folder import alone_in

Say = Callable[[str], None]
LIMITS = ("limit", "items", "prompt_limit")
"""How measures call the option that shortens them."""
LEVEL = 0.05
"""A difference whose adjusted p is not below it is marked as not significant."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    subjects: Sequence[str]
    out: Path
    suite: str | None = None
    measures: Path | None = None
    overrides: Sequence[str] = ()
    judge: str | None = None
    policy: str | None = None
    """The model that a judge asks which asks the policy."""
    initial: str | None = None
    """The model from which subjects started that are no run's."""
    data: str | None = None
    limit: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    """Run code that comes with a run's model, where its recipe asks for it."""


def evaluate(options: Options, say: Say) -> dict[str, Any]:
    """Measure all subjects and write the report; returns it. `say` is told what is done. Raises PrefloopError."""
    keep_freed_memory()
    sources = [find(text, trust=options.trust_remote_code) for text in options.subjects]
    called = names(sources)
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise RecipeError(f"{twice} is named twice; name each subject once")
    with alone_in(options.out, "evaluation"):
        prompts, told = _prompts(options, sources)
        limits = dict.fromkeys(LIMITS, options.limit) if options.limit else {}
        defaults = {"held_out": prompts, **limits}
        chosen = choose(options.suite, options.measures, options.overrides, defaults)
        able, unable = _checked(chosen)
        judge = EvaluationJudge.of(options.judge, options.policy, sources, prompts)
        report: dict[str, Any] = {
            "prefloop": __version__,
            "suite": options.suite,
            "prompts": told,
            "judge": judge.told,
            "seed": options.seed,
            "environment": environment(),
            "subjects": {},
        }
        items: dict[str, dict[str, tuple[Item, ...]]] = {}
        for name, source in zip(called, sources, strict=True):
            one = SubjectRun(options, name, source, judge, say)
            report["subjects"][name], items[name] = one.measured(able, unable)
        report["comparisons"] = _comparisons(items, options.seed)
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(options.out / "evaluation.json", text + "\n")
    return report


def _checked(chosen: Sequence[Chosen]) -> tuple[list[Chosen], dict[str, str]]:
    """Those that can be taken, and why the others cannot; raises where one of those was asked for by name."""
    able, unable = [], {}
    for one in chosen:
        try:
            one.measure.check()
        except PrefloopError as error:
            if one.asked:
                raise type(error)(f"{one.name}: {error}") from error
            unable[one.name] = str(error)
        else:
            able.append(one)
    return able, unable


class SubjectRun:
    """One subject's measuring."""

    def __init__(
        self, options: Options, name: str, source: Source, judge: EvaluationJudge, say: Say
    ) -> None:
        self.options = options
        self.name = name
        self.source = source
        self.judge = judge
        self.say = say
        self.weights = source.weights()
        self.initial = source.initial() or (
            Source(options.initial).weights() if options.initial else None
        )
        self.folder = options.out / "kept" / f"{_slug(name)}-{self.weights[:12]}"
        self._places: dict[str, Path] = {}

    def measured(
        self, able: Sequence[Chosen], unable: Mapping[str, str]
    ) -> tuple[dict[str, Any], dict[str, tuple[Item, ...]]]:
        """The report's part on the subject, and the items of each measure."""
        skipped, todo = dict(unable), [self._bound(one) for one in able]
        done: dict[str, dict[str, Any]] = {}
        for one in todo:
            if (cached_records := self._read(one)) is not None:
                done[one.name] = cached_records
        if missing := [one for one in todo if one.name not in done]:
            with opened(self.source, self.options.initial) as model:
                subjects = {one.name: self._subject(one, model) for one in missing}
                for one in missing:  # all of them before the first is taken, which may last hours
                    if (lacks := one.measure.lacks(subjects[one.name])) is not None:
                        if one.asked:
                            raise RecipeError(f"{one.name}: {lacks}")
                        skipped[one.name] = lacks
                for one in missing:
                    if one.name not in skipped:
                        done[one.name] = self._take(one, subjects[one.name])
        part = {
            "source": self.source.text,
            "weights": self.weights,
            "initial": self.initial,
            "measures": {one.name: done[one.name] for one in todo if one.name in done},
            "skipped": skipped,
            "curves": curves(self.source.run) if self.source.run else None,
        }
        items = {
            one.name: tuple(read_jsonl(self._place(one) / "items.jsonl", Item))
            for one in todo
            if one.name in done
        }
        return part, items

    def _bound(self, one: Chosen) -> Chosen:
        """With the subject's own run where the measure takes one and none is named."""
        run = self.source.run
        if run is None or getattr(one.measure, "of", "") is not None:
            return one
        bound = one.measure.model_copy(update={"of": str(run.path)})
        return Chosen(one.name, bound, one.asked)

    def _subject(self, one: Chosen, model: Any) -> Subject:
        return Subject(
            name=self.name,
            engine=model.engine,
            initial=model.initial,
            model=model.model,
            tokenizer=model.tokenizer,
            judge=self.judge.opened if _asks_judge(one.measure) else None,
            folder=self._place(one) / "on-its-way",
            seed=self.options.seed,
            answers=self.folder / f"answers-{__version__}",
        )

    def _take(self, one: Chosen, subject: Subject) -> dict[str, Any]:
        """Take the measure, keep its outcome, and return its part of the report."""
        for folder in (subject.folder, subject.answers):
            assert folder is not None
            folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        outcome = one.measure.run(subject)
        seconds = round(time.perf_counter() - start, 1)
        place = self._place(one)
        part = place / "items.part"
        write_jsonl(part, outcome.items)
        part.replace(place / "items.jsonl")
        row = {
            "options": one.measure.model_dump(mode="json"),
            "better": dict(one.measure.better),
            "estimates": {name: asdict(found) for name, found in outcome.estimates.items()},
            "items": len(outcome.items),
            "facts": dict(outcome.facts or {}),
            "seconds": seconds,
        }
        json.dumps(row, allow_nan=False)  # ValueError: a measure's bug must not be kept
        self._outcome(one).write(row, [place / "items.jsonl"])
        # What it kept on its way may be what the result leaves out.
        shutil.rmtree(subject.folder)
        self.say(f"{self.name}  {one.name}  {seconds:.1f} s")
        return {**row, "kept_from_before": False}

    def _read(self, one: Chosen) -> dict[str, Any] | None:
        row = self._outcome(one).verify()
        if row is None:
            return None
        del row["files"]
        return {**row, "kept_from_before": True}

    def _outcome(self, one: Chosen) -> Manifest:
        place = self._place(one)
        remedy = f"delete {place}, and the same command measures it again"
        return Manifest(place / "outcome.json", remedy)

    def _place(self, one: Chosen) -> Path:
        # Once: a file that changes while it is measured must not lead elsewhere.
        if one.name not in self._places:
            self._places[one.name] = self.folder / f"{_slug(one.name)}-{self._key(one)[:12]}"
        return self._places[one.name]

    def _key(self, one: Chosen) -> str:
        options = {
            # What ends an answer is a text, whatever file or folder is called so.
            name: value
            if isinstance(getattr(one.measure, name), Sampling)
            else _with_contents(value)
            for name, value in one.measure.model_dump(mode="json").items()
        }
        # What measures share decides as well as the measure's own file.
        shared = sorted(Path(prefloop.evaluate.__file__).parent.glob("*.py"))
        code = [contents(file) for file in (*shared, Path(inspect.getfile(type(one.measure))))]
        return digest(
            one.name,
            options,
            self.initial,
            self.judge.key if _asks_judge(one.measure) else None,
            self.options.seed,
            __version__,
            code,
        )


def _asks_judge(measure: Measure) -> bool:
    return measure.needs_judge or measure.asks_judge


def _with_contents(value: Any) -> Any:
    """Options, a path in which is replaced by what lies there."""
    if isinstance(value, Mapping):
        return {key: _with_contents(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_contents(inner) for inner in value]
    if isinstance(value, str) and value:
        try:
            path = Path(value).expanduser()
            if (path / "recipe.yaml").is_file():  # of a run, what is asked for is its method
                return contents(path / "recipe.yaml")
            if path.exists():
                return contents(path)
        except (OSError, RuntimeError):  # too long for a path, or no user's home: a text
            pass
    return value


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[-60:]


def _prompts(options: Options, sources: Sequence[Source]) -> tuple[str, str]:
    """The source that measures read their prompts from, and how the report calls it."""
    if options.data is not None:
        next(read_prompts(options.data, DataOptions(), part="eval"), None)  # raises in time
        return options.data, options.data
    found = {
        str(source.run.path): prompts
        for source in sources
        if source.run and (prompts := held_out(source))
    }
    for (first, mine), (other, theirs) in pairwise(found.items()):
        if mine != theirs:
            raise DataError(
                f"{first} and {other} hold out different prompts; name prompts for both with --data"
            )
    if not found:
        return EMBEDDED, EMBEDDED
    first, prompts = next(iter(found.items()))
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
    (first, mine), *others = items.items()
    rows: list[dict[str, Any]] = []
    for name, theirs in others:
        for measure in (measure for measure in mine if measure in theirs):
            for found in differences(mine[measure], theirs[measure], seed=seed):
                rows.append(
                    {
                        "measure": measure,
                        "metric": found.metric,
                        "subject": name,
                        "against": first,
                        "difference": asdict(found.estimate),
                        "p": found.p,
                    }
                )
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row |= {"p_holm": adjusted, "significant": adjusted < LEVEL}
    return rows
