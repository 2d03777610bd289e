"""The leaderboard beside lm-evaluation-harness's own model class, on a tiny model and made-up questions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import DataError, ModelError, RunFolderError
from prefloop.evaluate.cache import cached_records
from prefloop.evaluate.measures import Outcome, Subject
from prefloop.evaluate.measures import leaderboard as module
from prefloop.evaluate.measures.leaderboard import (
    BENCHMARKS,
    MEAN,
    Leaderboard,
    load_tasks,
)
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.hf_engine import HFEngine
from tests.conftest import tiny_llama

pytest.importorskip("lm_eval", reason="needs the extra eval, which make setup installs")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ITEMS = 59  # two subjects of MMLU are asked twice; the other tasks have fewer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.evaluate.benchmark_data import write

    return write(tmp_path_factory.mktemp("leaderboard") / "data")


@pytest.fixture(scope="module")
def engine(tokenizer: Any) -> HFEngine:
    """Weights large enough that choices differ clearly; prompts of several benchmarks exceed its window."""
    model = tiny_llama(len(tokenizer))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    model.config.max_position_embeddings = 1100
    return HFEngine(model, tokenizer, batch_size=8)


def subject_of(engine: HFEngine, folder: Path, name: str = "tiny") -> Subject:
    folder.mkdir(exist_ok=True)
    return Subject(name, engine, None, engine.model, engine.chat.tokenizer, None, folder, seed=3)


@pytest.fixture(scope="module")
def outcome(engine: HFEngine, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    where = tmp_path_factory.mktemp("answers")
    return Leaderboard(folder=folder, items=ITEMS).run(subject_of(engine, where))


def by_the_harness(engine: HFEngine, folder: Path, chat_template: bool = False, **only: Any) -> Any:
    """What its command line calls, with its own model class."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    options = Leaderboard(folder=folder, items=ITEMS, **only)
    sizes = {n: len(t.eval_docs) for n, t in load_tasks(options.tasks, folder).items()}
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=engine.model, tokenizer=engine.chat.tokenizer, batch_size=3),
        tasks=[f"prefloop_{name}" for name in options.tasks],
        samples={name: list(numbers) for name, numbers in options.drawn(sizes, 3).items()},
        task_manager=TaskManager(
            include_path=[*module.harness_folders(), module.TASKS],
            include_defaults=False,
            metadata={"folder": str(folder)},
        ),
        bootstrap_iters=0,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
    )


def values_of(samples: Mapping[str, Any]) -> dict[str, float]:
    """Written anew here, not by the measure's own code."""
    cached_records = {}
    for task, rows in samples.items():
        metric = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "gsm8k": "exact_match"}
        for row in rows:
            if row["filter"] != "flexible-extract":
                cached_records[f"{task}/{row['doc_id']}"] = float(row[metric.get(task, "acc")])
    return cached_records


def test_every_question_counts_as_the_harness_counts_it(
    outcome: Outcome, engine: HFEngine, folder: Path
) -> None:
    results = by_the_harness(engine, folder)
    expected = values_of(results["samples"])
    found = {item.id: item.values[item.group] for item in outcome.items}
    assert found.keys() == expected.keys()
    assert len(found) == 4 + 13 + 59 + 3 + 7 + 2
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-4), key
    texts = {i.id: i.texts["answer"] for i in outcome.items if i.group == "gsm8k"}
    for row in results["samples"]["gsm8k"]:
        assert texts[f"gsm8k/{row['doc_id']}"] == row["resps"][0][0]
    for benchmark in ("arc_challenge", "hellaswag", "winogrande", "truthfulqa_mc2"):
        metric = "acc_norm,none" if benchmark in ("arc_challenge", "hellaswag") else "acc,none"
        assert outcome.estimates[benchmark].value == pytest.approx(
            results["results"][benchmark][metric], abs=1e-4
        )
    assert 0 < outcome.estimates["arc_challenge"].value + outcome.estimates["mmlu"].value < 2


def test_the_facts_say_what_was_asked(outcome: Outcome) -> None:
    from importlib.metadata import version

    facts = outcome.facts
    assert facts is not None
    assert facts["harness"].endswith(version("lm_eval"))
    assert {n: f["shots"] for n, f in facts["tasks"].items()} == {
        "arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5,
    }  # fmt: skip
    assert (facts["tasks"]["mmlu"]["items"], facts["tasks"]["mmlu"]["of"]) == (59, 114)
    assert facts["tasks"]["hellaswag"]["of"] == 13, "the other half are its examples"
    assert facts["cut_prompts"] > 0, "the tiny window is there to cut some"
    json.dumps(facts)


def test_mmlu_is_the_mean_of_its_subjects_and_the_mean_that_of_the_six(outcome: Outcome) -> None:
    by_subject: dict[str, list[float]] = {}
    for item in outcome.items:
        if item.group == "mmlu":
            by_subject.setdefault(item.id.split("/")[0], []).append(item.values["mmlu"])
    assert sorted(map(len, by_subject.values())) == [1] * 55 + [2] * 2
    means = [sum(values) / len(values) for values in by_subject.values()]
    assert outcome.estimates["mmlu"].value == pytest.approx(sum(means) / 57)
    parts = [outcome.estimates[name].value for name in BENCHMARKS]
    assert outcome.estimates[MEAN].value == pytest.approx(sum(parts) / 6)
    assert next(iter(outcome.estimates)) == MEAN


def test_a_killed_evaluation_goes_on_where_it_was(
    engine: HFEngine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefloop.evaluate import lm_eval_model as harness

    monkeypatch.setattr(harness, "_SCORED_PER_FILE", 7)
    monkeypatch.setattr(engine.model.config, "max_position_embeddings", 500)  # some are cut
    options = Leaderboard(folder=folder, tasks=("winogrande", "hellaswag"))
    expected = options.run(subject_of(engine, tmp_path / "whole"))
    assert (expected.facts or {})["cut_prompts"] > 0
    real, asked = HFEngine.score_tokens, []

    def killed(self: HFEngine, rows: Any, starts: Any) -> Any:
        asked.append(len(rows))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, rows, starts)

    monkeypatch.setattr(HFEngine, "score_tokens", killed)
    where = subject_of(engine, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        options.run(where)
    (last,) = where.folder.glob("*/00001.jsonl")
    last.with_name("00002.part").write_text('{"logprob": -1.2, "gre')  # torn
    assert options.run(where) == expected
    assert sum(asked) == 2 * 7 + 13 * 4 + 7, "the answers of the first two parts are kept"
    calls = len(asked)
    assert options.run(where) == expected
    assert len(asked) == calls, "all was answered"
    last.write_text("nonsense\n" + last.read_text())
    with pytest.raises(RunFolderError, match=r"00001\.jsonl is .* bytes long and not"):
        options.run(where)


def test_with_the_chat_template_the_prompts_are_turns(
    engine: HFEngine, folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tasks": ("winogrande",)}
    plain = Leaderboard(folder=folder, **options).run(subject_of(engine, tmp_path / "a"))
    chat = Leaderboard(folder=folder, chat_template=True, items=ITEMS, **options).run(
        subject_of(engine, tmp_path / "b")
    )
    expected = values_of(by_the_harness(engine, folder, chat_template=True, **options)["samples"])
    assert {item.id: item.values[item.group] for item in chat.items} == expected
    assert plain.facts is not None
    assert chat.facts is not None
    assert plain.facts["prompts"] != chat.facts["prompts"]
    assert MEAN not in plain.estimates


@pytest.mark.parametrize(
    ("items", "by_subject"), [(1, 1), (2, 2), (9, 8), (30, 22), (60, 42), (None, 62)]
)
def test_a_subset_spreads_evenly_over_subjects(items: int | None, by_subject: int) -> None:
    sizes = {"mmlu_a": 40, "mmlu_b": 20, "mmlu_c": 2, "winogrande": 70}
    options = Leaderboard(tasks=("mmlu", "winogrande"), items=items)
    found = options.drawn(sizes, 5)
    assert found == options.drawn(sizes, 5)
    assert len(found["winogrande"]) == (items or 70)
    counts = [len(found.get(f"mmlu_{subject}", ())) for subject in "abc"]
    assert sum(counts) == by_subject, "a subject that has fewer gives all it has"
    if items:
        assert found["winogrande"] != options.drawn(sizes, 6)["winogrande"]
        assert max(counts[:2]) - min(counts[:2]) <= 1
    for name, numbers in found.items():
        assert sorted(set(numbers)) == list(numbers)
        assert max(numbers) < sizes[name]


def test_what_stops_it_is_said_before_a_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks winogrande_train.jsonl, winogrande_val.jsonl"):
        Leaderboard(folder=tmp_path, tasks=("winogrande",)).check()
    Leaderboard(folder=folder).check()
    subject = Subject("served", FakeEngine(), None, None, None, None, tmp_path, 0)
    with pytest.raises(ModelError, match=r"served: .*engine hf"):
        Leaderboard(folder=folder).run(subject)


def test_a_malformed_row_is_named(engine: HFEngine, folder: Path, tmp_path: Path) -> None:
    for name in ("winogrande_train", "winogrande_val"):
        text = (folder / f"{name}.jsonl").read_text()
        (tmp_path / f"{name}.jsonl").write_text(text)
    path = tmp_path / "winogrande_val.jsonl"
    whole = path.read_bytes()
    for data, says in (
        (b'\n{"sentence": "no options _ here"}\n', r"winogrande_val.jsonl:9 .*option1"),
        (b'{"sentence": "\xe9"}\n', r"winogrande_val.jsonl:8 is not UTF-8"),
        (b"{sentence}\n", r"winogrande_val.jsonl:8 is not JSON"),
        (None, r"winogrande_val.jsonl holds no rows"),
    ):
        path.write_bytes(b"" if data is None else whole + data)
        with pytest.raises(DataError, match=says):
            Leaderboard(folder=tmp_path, tasks=("winogrande",)).run(
                subject_of(engine, tmp_path / "subject")
            )


def test_too_few_examples_are_an_error_of_the_data(
    engine: HFEngine, folder: Path, tmp_path: Path
) -> None:
    for name in ("winogrande_train", "winogrande_val"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:4]))
    with pytest.raises(DataError, match="more examples"):
        Leaderboard(folder=tmp_path, tasks=("winogrande",)).run(
            subject_of(engine, tmp_path / "subject")
        )


def test_a_choice_without_any_probability_is_kept_as_that(tmp_path: Path) -> None:
    from prefloop.evaluate.lm_eval_model import _Likelihood

    never = _Likelihood(logprob=-math.inf, greedy=False)
    assert cached_records(tmp_path, [0], _Likelihood, lambda part, number: [never], chunk=1) == [
        never
    ]
