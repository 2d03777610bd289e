"""What every measure owes `prefloop evaluate`. A new file in prefloop/evaluate/measures is tested here.

A measure is put to work with its defaults. One that can measure nothing with them has an entry in EXAMPLES, or a
function `example(folder)` in its test file, that writes the small data it needs and returns its options. Without
one, its tests fail and say so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import PrefloopError
from prefloop.evaluate.measures import Measure, Outcome, Subject
from prefloop.evaluate.suites import SUITES, find_measure, measure_names
from prefloop.generate.engines.fake import FakeEngine
from prefloop.generate.hf_engine import HFEngine
from prefloop.judges import Verdict
from prefloop.records import Prompt
from tests.conftest import tiny_llama
from tests.contract.examples import example_in_tests

MEASURES = measure_names()
HARNESS = {"ifeval": ("lm_eval", "langdetect", "punkt"), "leaderboard": ("lm_eval",)}
"""What of lm-evaluation-harness and its helpers a measure imports; without them its tests are skipped."""
every_measure = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.filterwarnings("ignore::DeprecationWarning"))
        if name in HARNESS
        else name
        for name in MEASURES
    ],
)


class ByLength:
    """A judge that scores each answer from 1 to 10 by its length."""

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return [tuple(1.0 + len(text) % 10 for text in group) for group in groups]


Example = Callable[[Path], dict[str, Any]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def held_out(folder: Path) -> dict[str, Any]:
    """For measures that answer prompts."""
    rows = [{"prompt": f"Name river {n}.", "response": f"It is river {n}."} for n in range(5)]
    return {"held_out": write(folder / "prompts.jsonl", rows)}


def drawing(folder: Path) -> dict[str, Any]:
    return {**held_out(folder), "sampling": {"max_new_tokens": 6}}


def preferences(folder: Path) -> dict[str, Any]:
    rows = [
        {"prompt": f"Name river {n % 3}.", "chosen": f"River {n}.", "rejected": f"No {n} name."}
        for n in range(5)
    ]
    return {"data": write(folder / "pairs.jsonl", rows)}


def introspection(folder: Path) -> dict[str, Any]:
    short = "{max_new_tokens: 4}"
    (folder / "recipe.yaml").write_text(
        f"name: r\nmethod: {{name: ial, sampling: {short}, advice: {short}}}\njudge: {{name: similarity}}\n"
    )
    return {**held_out(folder), "of": str(folder)}


def jailbreak(folder: Path) -> dict[str, Any]:
    templates = [{"id": f"t{n}", "template": f"{n}: [INSERT PROMPT HERE]"} for n in range(2)]
    prompts = [{"id": f"p{n}", "prompt": f"Tell me the pudding number {n}"} for n in range(3)]
    return {
        "templates": write(folder / "templates.jsonl", templates),
        "prompts": (write(folder / "prompts.jsonl", prompts),),
        "attacks": None,
        "sampling": {"max_new_tokens": 4},
    }


def over_refusal(folder: Path) -> dict[str, Any]:
    rows = [
        {"id": f"{label}{n}", "prompt": f"May I {label} {n}?", "type": "homonyms", "label": label}
        for label in ("safe", "unsafe")
        for n in range(3)
    ]
    return {"prompts": write(folder / "prompts.jsonl", rows), "sampling": {"max_new_tokens": 4}}


def mt_bench(folder: Path) -> dict[str, Any]:
    rows = [
        {"id": f"{kind}{n}", "category": kind, "turns": [f"First {n}?", "Second?"], "reference": []}
        for kind in ("writing", "math")
        for n in range(2)
    ]
    data = write(folder / "questions.jsonl", rows)
    return {"data": data, "judge_range": (1.0, 10.0), "max_new_tokens": 4}


def ifeval(folder: Path) -> dict[str, Any]:
    rows = [
        {
            "id": str(n),
            "prompt": f"Write line {n} without commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for n in range(3)
    ]
    return {"data": write(folder / "ifeval.jsonl", rows), "sampling": {"max_new_tokens": 4}}


def leaderboard(folder: Path) -> dict[str, Any]:
    from tests.evaluate.benchmark_data import write as write_benchmarks

    return {"folder": str(write_benchmarks(folder)), "tasks": ["winogrande"], "items": 3}


EXAMPLES: dict[str, Example] = {
    "ifeval": ifeval,
    "jailbreak": jailbreak,
    "mt_bench": mt_bench,
    "over_refusal": over_refusal,
    "divergence": lambda folder: {**held_out(folder), "max_new_tokens": 6},
    "health": drawing,
    "introspection": introspection,
    "leaderboard": leaderboard,
    "preferences": preferences,
    "win_rate": drawing,
}


def example(name: str, folder: Path) -> Measure:
    for module in HARNESS.get(name, ()):
        pytest.importorskip(module, reason="needs the extra eval, which make setup installs")
    folder.mkdir(parents=True, exist_ok=True)
    if name in EXAMPLES:
        options = EXAMPLES[name](folder)
    else:
        with example_in_tests("evaluate.measures", name, folder) as made:
            options = made or {}
    measure = find_measure(name).model_validate(options)
    complaint = complaint_of(measure)
    assert complaint is None, (
        f"measure {name} cannot be put to work ({complaint}): let tests/evaluate/measures/test_{name}.py have a "
        "function `example(folder)` that writes the small data it needs and returns its options"
    )
    return measure


def complaint_of(measure: Measure) -> str | None:
    """What its check says; an error that is not a user's goes through."""
    try:
        measure.check()
    except PrefloopError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def engines(tokenizer: Any) -> tuple[HFEngine, HFEngine]:
    """Two tiny models: the subject and what it started from."""
    return tuple(HFEngine(tiny_llama(len(tokenizer), seed), tokenizer) for seed in (1, 2))  # type: ignore[return-value]


def subject(engines: tuple[HFEngine, HFEngine], folder: Path, **changes: Any) -> Subject:
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "name": "tiny",
        "engine": engines[0],
        "initial": engines[1],
        "model": engines[0].model,
        "tokenizer": engines[0].chat.tokenizer,
        "judge": ByLength(),
        "folder": folder,
        "seed": 3,
        **changes,
    }
    return Subject(**values)


@pytest.fixture(scope="module")
def outcomes(
    engines: tuple[HFEngine, HFEngine], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Measure, Path, Outcome]]:
    """Each measure's outcome, taken once for all tests: measure, folder, outcome."""
    done: dict[str, tuple[Measure, Path, Outcome]] = {}

    def get(name: str) -> tuple[Measure, Path, Outcome]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            measure = example(name, folder / "data")
            done[name] = measure, folder, measure.run(subject(engines, folder / "kept"))
        return done[name]

    return get


def test_there_are_measures() -> None:
    assert {"preferences", "win_rate", "divergence", "health", "introspection"} <= set(MEASURES)


@every_measure
def test_it_says_what_it_is_and_what_each_option_does(name: str) -> None:
    kind = find_measure(name)
    first_line = (kind.__doc__ or "").strip().partition("\n")[0]
    assert first_line.endswith("."), "the class docstring's first line is what `ls measures` shows"
    assert [key for key, info in kind.model_fields.items() if not info.description] == []
    assert set(kind.suites) <= set(SUITES)


@every_measure
def test_its_options_survive_json(name: str, tmp_path: Path) -> None:
    measure = example(name, tmp_path)
    assert type(measure).model_validate_json(measure.model_dump_json(), strict=True) == measure


@every_measure
def test_without_data_it_says_so_before_a_model_is_loaded(name: str) -> None:
    complaint = complaint_of(find_measure(name)())
    assert complaint is None or len(complaint.splitlines()) == 1


@every_measure
def test_its_outcome_is_what_tables_and_comparisons_need(name: str, outcomes: Any) -> None:
    measure, _, outcome = outcomes(name)
    assert outcome.estimates
    for metric, estimate in outcome.estimates.items():
        assert estimate.count >= 1, metric
        assert all(map(math.isfinite, (estimate.low, estimate.value, estimate.high))), metric
        assert estimate.low <= estimate.value <= estimate.high, metric
    assert set(measure.better) & set(outcome.estimates) or not measure.better
    keys = [(item.group, item.id) for item in outcome.items]
    assert len(set(keys)) == len(keys), "two items of one group share their id"
    assert all(math.isfinite(v) for item in outcome.items for v in item.values.values())
    json.dumps(dict(outcome.facts or {}), allow_nan=False)


@every_measure
def test_a_killed_measure_goes_on_to_the_same_outcome(
    name: str, engines: Any, outcomes: Any
) -> None:
    measure, folder, outcome = outcomes(name)
    # What the first call has kept lies in its folder: this is a call that goes on after everything.
    assert measure.run(subject(engines, folder / "kept")) == outcome
    assert measure.run(subject(engines, folder / "another")) == outcome


@every_measure
def test_it_names_what_a_subject_lacks(name: str, engines: Any, tmp_path: Path) -> None:
    measure = example(name, tmp_path / "data")
    assert measure.lacks(subject(engines, tmp_path / "a")) is None
    bare = subject(engines, tmp_path / "b", judge=None, initial=None)
    lacks = measure.lacks(bare)
    if measure.needs_judge or measure.needs_initial:
        assert lacks
    if lacks is None:
        assert measure.run(bare).estimates


def test_a_measure_without_an_example_is_told_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(EXAMPLES, "preferences")
    with pytest.raises(AssertionError, match=r"tests/evaluate/measures/test_preferences\.py"):
        example("preferences", tmp_path)


def test_a_fake_engine_is_enough_for_measures_that_ask_no_judge(tmp_path: Path) -> None:
    fake = FakeEngine()
    bare = Subject("fake", fake, fake, None, None, None, tmp_path, 0)
    found = example("preferences", tmp_path / "data").run(bare)
    assert found.estimates["acs"].value == 0.0
    assert found.estimates["pair_accuracy"].value == 0.5
