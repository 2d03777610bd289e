"""Open LLM Leaderboard v1 (Beeching et al. 2023): six benchmarks at its shots and metrics, and their mean."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast, get_args

import numpy as np
from pydantic import Field

from prefloop.errors import DataError, ModelError, PrefloopError
from prefloop.evaluate.measures import Item, Measure, Outcome, Subject, Suite
from prefloop.evaluate.stats import Estimate, bootstrap_mean, mean_of, share_of_strata
from prefloop.records import derive_seed

if TYPE_CHECKING:
    from prefloop.generate.engine import TokenEngine

Benchmark = Literal["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k"]
BENCHMARKS: tuple[Benchmark, ...] = get_args(Benchmark)
Drawn = Mapping[str, Sequence[int]]
"""Numbers of the questions that are asked, by the harness's name of the task."""

MEAN = "leaderboard_mean"
TASKS = Path(__file__).parents[1] / "leaderboard_tasks"
_FILES = (
    "arc_challenge_test arc_challenge_trainval gsm8k_test gsm8k_train hellaswag_val mmlu_dev mmlu_test "
    "truthfulqa_mc winogrande_train winogrande_val"
).split()
# The harness's default, which decides the examples that stand before each question.
_EXAMPLES_SEED = 1234


class _Scored(NamedTuple):
    """How a benchmark counts."""

    metric: str
    filter: str = "none"
    graded: bool = False
    """Whether a question gives a part of 1, not all or nothing."""


_SCORED: dict[str, _Scored] = {
    "arc_challenge": _Scored("acc_norm"),
    "hellaswag": _Scored("acc_norm"),
    "mmlu": _Scored("acc"),
    "truthfulqa_mc2": _Scored("acc", graded=True),
    "winogrande": _Scored("acc"),
    # The number after ####, as in 2023; the harness's other filter takes any last number.
    "gsm8k": _Scored("exact_match", "strict-match"),
}


class Leaderboard(Measure):
    """Open LLM Leaderboard v1 through lm-evaluation-harness."""

    suites: ClassVar[tuple[Suite, ...]] = ("leaderboard",)

    folder: Path | None = None
    """Folder of local files (docs/leaderboard.md); None loads the hub's data sets."""
    tasks: tuple[Benchmark, ...] = Field(default=BENCHMARKS, min_length=1)
    """Which of the six; their mean is given for all six only."""
    items: int | None = Field(default=None, ge=1)
    """Questions drawn from each task, MMLU's spread evenly over its subjects; None asks all."""
    chat_template: bool = False
    """Put the prompts into the tokenizer's chat template, examples as turns. The leaderboard of 2023 did not."""

    def check(self) -> None:
        """The harness must be installed, local files there."""
        if find_spec("lm_eval") is None:
            raise ModelError(
                "the leaderboard needs lm-evaluation-harness; pip install 'prefloop[eval]'"
            )
        if self.folder is not None:
            names = [n for n in _FILES if n.startswith(tuple(t[:10] for t in self.tasks))]
            lost = [
                f"{name}.jsonl" for name in names if not (self.folder / f"{name}.jsonl").is_file()
            ]
            if lost:
                raise DataError(
                    f"leaderboard.folder {self.folder} lacks {', '.join(lost)}; put them there "
                    "(docs/leaderboard.md), or leave the option out to load the hub's data sets"
                )

    def lacks(self, subject: Subject) -> str | None:
        """A model in this process, whose tokens can be scored as they stand."""
        if subject.model is None or not hasattr(subject.engine, "score_tokens"):
            return (
                f"{subject.name}: the leaderboard needs a model in this process; use the engine hf"
            )
        return super().lacks(subject)

    def run(self, subject: Subject) -> Outcome:
        """Ask, and count as the leaderboard did."""
        self.check()
        if lack := self.lacks(subject):
            raise ModelError(lack)
        from prefloop.evaluate.lm_eval_model import PolicyLM

        engine = cast("TokenEngine", subject.engine)
        lm = PolicyLM(engine, subject.model, subject.tokenizer, subject.folder, subject.seed)
        with _quiet():
            tasks = load_tasks(self.tasks, self.folder)
            sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
            drawn = self.drawn(sizes, subject.seed)
            results = self._asked(lm, {name: tasks[name] for name in drawn}, drawn)
        items = _items(results["samples"])
        estimates = estimates_of(items, seed=subject.seed)
        facts = {
            "harness": f"lm-evaluation-harness {version('lm_eval')}",
            "data": "hub" if self.folder is None else "local files",
            "tasks": _tasks_as_facts(tasks, sizes, drawn),
            "chat_template": self.chat_template,
            "prompts": _digest(results["samples"]),
            "cut_prompts": lm.cut,
        }
        return Outcome(estimates, items, facts)

    def drawn(self, sizes: Mapping[str, int], seed: int) -> Drawn:
        """The questions that are asked; the same seed gives the same for every model."""
        found: dict[str, list[int]] = {}
        for benchmark in self.tasks:
            own = {name: size for name, size in sizes.items() if benchmark_of(name) == benchmark}
            generator = np.random.default_rng(derive_seed(seed, "leaderboard", benchmark))
            found |= _draw(own, self.items, generator)
        return found

    def _asked(self, lm: Any, tasks: Mapping[str, Any], drawn: Drawn) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate

        try:
            found: dict[str, Any] | None = evaluate(
                lm=lm,
                task_dict={"tasks": dict(tasks), "groups": {}},
                samples={name: list(numbers) for name, numbers in drawn.items()},
                bootstrap_iters=0,
                apply_chat_template=self.chat_template,
                fewshot_as_multiturn=self.chat_template,
            )
        except (ValueError, AssertionError) as error:
            if isinstance(error, PrefloopError):
                raise
            raise DataError(
                f"lm-evaluation-harness cannot ask these questions ({error}); each task needs more "
                "examples than it shows, see docs/leaderboard.md"
            ) from error
        assert found is not None
        return found


def benchmark_of(task: str) -> str:
    """Which of the six a task of the harness belongs to: MMLU has one for each subject."""
    return "mmlu" if task.startswith("mmlu_") else task


def load_tasks(benchmarks: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """The harness's task objects by its names, in the order of the benchmarks, with their data."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=[*harness_folders(), TASKS],
        include_defaults=False,
        metadata={} if folder is None else {"folder": str(folder)},
    )
    if folder is None:
        loaded = manager.load(["prefloop_leaderboard_hub"])
    else:
        loaded = manager.load([f"prefloop_{benchmark}" for benchmark in benchmarks])
    tasks: dict[str, Any] = loaded["tasks"]
    for task in tasks.values():
        task.set_fewshot_seed(seed=_EXAMPLES_SEED)
    return {name: task for name, task in tasks.items() if benchmark_of(name) in benchmarks}


def harness_folders() -> list[Path]:
    """Where the harness keeps the six; all of its 14,000 tasks take long to read."""
    import lm_eval

    own = Path(lm_eval.__file__).parent / "tasks"
    names = ("arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k")
    return [own / name for name in names]


def estimates_of(items: Sequence[Item], *, seed: int) -> dict[str, Estimate]:
    """Each benchmark's value with its interval, and for all six their mean's."""
    found = {}
    for benchmark, scored in _SCORED.items():
        strata: dict[str, list[float]] = {}
        for item in items:
            if item.group == benchmark:
                strata.setdefault(stratum_of(item), []).append(item.values[benchmark])
        if not strata:
            continue
        if scored.graded:
            (values,) = strata.values()
            estimate = bootstrap_mean(values, seed=derive_seed(seed, benchmark))
            assert estimate is not None
            found[benchmark] = estimate
        else:
            found[benchmark] = share_of_strata(strata)
    if len(found) == len(_SCORED):
        return {MEAN: mean_of(list(found.values())), **found}
    return found


def stratum_of(item: Item) -> str:
    """The harness's task: for MMLU the subject."""
    return item.id.rpartition("/")[0]


def _draw(
    sizes: Mapping[str, int], items: int | None, generator: np.random.Generator
) -> dict[str, list[int]]:
    """Numbers of questions by task: as many from each as possible, the rest from tasks drawn by chance."""
    if items is None:
        return {name: list(range(size)) for name, size in sizes.items()}
    each, rest = divmod(items, len(sizes))
    more = set(generator.permutation(list(sizes))[:rest].tolist())
    found = {}
    for name, size in sizes.items():
        count = min(size, each + (name in more))
        if count:
            found[name] = sorted(generator.choice(size, size=count, replace=False).tolist())
    return found


def _items(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[Item, ...]:
    found = []
    for task, rows in samples.items():
        benchmark = benchmark_of(task)
        scored = _SCORED[benchmark]
        for row in rows:
            if row["filter"] != scored.filter:
                continue
            generated = isinstance(row["resps"][0][0], str)
            found.append(
                Item(
                    id=f"{task}/{row['doc_id']}",
                    values={benchmark: float(row[scored.metric])},
                    group=benchmark,
                    texts={"answer": row["resps"][0][0]} if generated else {},
                )
            )
    return tuple(found)


def _tasks_as_facts(
    tasks: Mapping[str, Any], sizes: Mapping[str, int], drawn: Drawn
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        benchmark = benchmark_of(name)
        facts = found.setdefault(
            benchmark,
            {
                "version": task.VERSION,
                "shots": task.config.num_fewshot,
                "metric": _SCORED[benchmark].metric,
                "items": 0,
                "of": 0,
            },
        )
        facts["items"] += len(drawn.get(name, ()))
        facts["of"] += sizes[name]
    return found


def _digest(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Of all prompts and choices: equal where two models were asked the same."""
    digest = sha256()
    for task, rows in samples.items():
        for row in rows:
            digest.update(f"{task} {row['doc_id']} {row['doc_hash']} {row['prompt_hash']}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and remarks of the harness, whose work is over in seconds; ours remain."""
    import datasets
    from lm_eval.api import task as harness_task

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, harness_task.tqdm
    were_off: bool = datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    harness_task.tqdm = partial(bar, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        harness_task.tqdm = bar
        if not were_off:
            datasets.enable_progress_bars()
