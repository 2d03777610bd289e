"""Open LLM Leaderboard v1 (Beeching et al. 2023): its six benchmarks with its shots and metrics, and their mean."""

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
from prefloop.evaluate.stats import Estimate, bootstrap_mean, mean_of, stratified_proportion
from prefloop.records import derive_seed

if TYPE_CHECKING:
    from prefloop.generate.engine import TokenEngine

Benchmark = Literal["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k"]
BENCHMARKS: tuple[Benchmark, ...] = get_args(Benchmark)
DrawnQuestions = Mapping[str, Sequence[int]]
"""Task of the harness -> indices of the questions that are asked."""

MEAN = "leaderboard_mean"
TASKS = Path(__file__).parents[1] / "leaderboard_tasks"
_FILE_NAMES = (
    "arc_challenge_test arc_challenge_trainval gsm8k_test gsm8k_train hellaswag_val mmlu_dev mmlu_test "
    "truthfulqa_mc winogrande_train winogrande_val"
).split()
# The harness's default seed for drawing few-shot examples.
_EXAMPLES_SEED = 1234


class _Metric(NamedTuple):
    """How a benchmark is scored: the harness's names of metric and filter."""

    metric: str
    filter: str = "none"
    graded: bool = False
    """Whether a question's score is a fraction, not 0 or 1."""


_METRICS: dict[str, _Metric] = {
    "arc_challenge": _Metric("acc_norm"),
    "hellaswag": _Metric("acc_norm"),
    "mmlu": _Metric("acc"),
    "truthfulqa_mc2": _Metric("acc", graded=True),
    "winogrande": _Metric("acc"),
    # The number after ####, as in 2023; the harness's other filter takes any last number.
    "gsm8k": _Metric("exact_match", "strict-match"),
}


class Leaderboard(Measure):
    """Open LLM Leaderboard v1 through lm-evaluation-harness."""

    suites: ClassVar[tuple[Suite, ...]] = ("leaderboard",)

    folder: Path | None = None
    """Folder of local files (docs/leaderboard.md); None loads the hub's data sets."""
    tasks: tuple[Benchmark, ...] = Field(default=BENCHMARKS, min_length=1)
    """Which of the six benchmarks; the mean is reported for all six only."""
    items: int | None = Field(default=None, ge=1)
    """Questions drawn from each task, MMLU's spread evenly over its subjects; None asks all."""
    chat_template: bool = False
    """Put the prompts into the tokenizer's chat template, examples as turns. The leaderboard of 2023 did not."""

    def check(self) -> None:
        """ModelError where the harness is not installed, DataError where local files are missing."""
        if find_spec("lm_eval") is None:
            raise ModelError(
                "the leaderboard needs lm-evaluation-harness; pip install 'prefloop[eval]'"
            )
        if self.folder is not None:
            names = [n for n in _FILE_NAMES if n.startswith(tuple(t[:10] for t in self.tasks))]
            missing = [
                f"{name}.jsonl" for name in names if not (self.folder / f"{name}.jsonl").is_file()
            ]
            if missing:
                raise DataError(
                    f"leaderboard.folder {self.folder} lacks {', '.join(missing)}; put them there "
                    "(docs/leaderboard.md), or leave the option out to load the hub's data sets"
                )

    def lacks(self, subject: Subject) -> str | None:
        """A missing model in this process: the harness scores token ids, which servers do not take."""
        if subject.model is None or not hasattr(subject.engine, "score_tokens"):
            return (
                f"{subject.name}: the leaderboard needs a model in this process; use the engine hf"
            )
        return super().lacks(subject)

    def run(self, subject: Subject) -> Outcome:
        """Run the harness, and score as the leaderboard did."""
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
            results = self._evaluate(lm, {name: tasks[name] for name in drawn}, drawn)
        items = _items(results["samples"])
        estimates = estimates_of(items, seed=subject.seed)
        facts = {
            "harness": f"lm-evaluation-harness {version('lm_eval')}",
            "data": "hub" if self.folder is None else "local files",
            "tasks": _task_facts(tasks, sizes, drawn),
            "chat_template": self.chat_template,
            "prompts": _prompts_digest(results["samples"]),
            "cut_prompts": lm.cut,
        }
        return Outcome(estimates, items, facts)

    def drawn(self, sizes: Mapping[str, int], seed: int) -> DrawnQuestions:
        """The questions to ask; the same seed draws the same questions for every model."""
        drawn: dict[str, list[int]] = {}
        for benchmark in self.tasks:
            own_sizes = {
                name: size for name, size in sizes.items() if benchmark_of(name) == benchmark
            }
            generator = np.random.default_rng(derive_seed(seed, "leaderboard", benchmark))
            drawn |= _draw_indices(own_sizes, self.items, generator)
        return drawn

    def _evaluate(self, lm: Any, tasks: Mapping[str, Any], drawn: DrawnQuestions) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate

        try:
            results: dict[str, Any] | None = evaluate(
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
        assert results is not None
        return results


def benchmark_of(task: str) -> str:
    """The benchmark that a task of the harness belongs to: MMLU has a task for each subject."""
    return "mmlu" if task.startswith("mmlu_") else task


def load_tasks(benchmarks: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """The harness's task objects by name, with their data, in the order of the benchmarks."""
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
    """The harness's folders of the six benchmarks; reading all of its 14,000 tasks would take long."""
    import lm_eval

    own = Path(lm_eval.__file__).parent / "tasks"
    names = ("arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k")
    return [own / name for name in names]


def estimates_of(items: Sequence[Item], *, seed: int) -> dict[str, Estimate]:
    """Each benchmark's estimate, preceded by their mean's where all six are there."""
    estimates = {}
    for benchmark, metric in _METRICS.items():
        strata: dict[str, list[float]] = {}
        for item in items:
            if item.group == benchmark:
                strata.setdefault(stratum_of(item), []).append(item.values[benchmark])
        if not strata:
            continue
        if metric.graded:
            (values,) = strata.values()
            estimate = bootstrap_mean(values, seed=derive_seed(seed, benchmark))
            assert estimate is not None
            estimates[benchmark] = estimate
        else:
            estimates[benchmark] = stratified_proportion(strata)
    if len(estimates) == len(_METRICS):
        return {MEAN: mean_of(list(estimates.values())), **estimates}
    return estimates


def stratum_of(item: Item) -> str:
    """The harness's task that the item belongs to: for MMLU one for each subject."""
    return item.id.rpartition("/")[0]


def _draw_indices(
    sizes: Mapping[str, int], items: int | None, generator: np.random.Generator
) -> dict[str, list[int]]:
    """Indices of questions by task: equally many from each, the remainder from tasks drawn at random."""
    if items is None:
        return {name: list(range(size)) for name, size in sizes.items()}
    each, remainder = divmod(items, len(sizes))
    with_one_more = set(generator.permutation(list(sizes))[:remainder].tolist())
    drawn = {}
    for name, size in sizes.items():
        count = min(size, each + (name in with_one_more))
        if count:
            drawn[name] = sorted(generator.choice(size, size=count, replace=False).tolist())
    return drawn


def _items(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[Item, ...]:
    items = []
    for task, rows in samples.items():
        benchmark = benchmark_of(task)
        metric = _METRICS[benchmark]
        for row in rows:
            if row["filter"] != metric.filter:
                continue
            generated = isinstance(row["resps"][0][0], str)
            items.append(
                Item(
                    id=f"{task}/{row['doc_id']}",
                    values={benchmark: float(row[metric.metric])},
                    group=benchmark,
                    texts={"answer": row["resps"][0][0]} if generated else {},
                )
            )
    return tuple(items)


def _task_facts(
    tasks: Mapping[str, Any], sizes: Mapping[str, int], drawn: DrawnQuestions
) -> dict[str, Any]:
    facts_by_benchmark: dict[str, Any] = {}
    for name, task in tasks.items():
        benchmark = benchmark_of(name)
        facts = facts_by_benchmark.setdefault(
            benchmark,
            {
                "version": task.VERSION,
                "shots": task.config.num_fewshot,
                "metric": _METRICS[benchmark].metric,
                "items": 0,
                "of": 0,
            },
        )
        facts["items"] += len(drawn.get(name, ()))
        facts["of"] += sizes[name]
    return facts_by_benchmark


def _prompts_digest(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A hash of all prompts and choices: equal where two models were asked the same."""
    digest = sha256()
    for task, rows in samples.items():
        for row in rows:
            digest.update(f"{task} {row['doc_id']} {row['doc_hash']} {row['prompt_hash']}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's progress bars and log messages inside."""
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
