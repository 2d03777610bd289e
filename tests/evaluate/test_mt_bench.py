"""MT-Bench: two turns in one conversation, categories and their temperatures, and the judge's scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from prefloop.errors import DataError, JudgeError
from prefloop.evaluate.measures.mt_bench import MtBench
from prefloop.generate.engines.fake import FakeEngine
from prefloop.judges import NoVerdict
from prefloop.records import Request, Response, Sampling
from tests.evaluate.asking import KilledAt, ListJudge, subject, write_rows


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows: list[dict[str, object]] = [
        {
            "id": f"{category}-{n}",
            "category": category,
            "turns": [f"{category} first {n}", f"{category} second {n}"],
            "reference": ["four", "five"] if category == "math" else [],
        }
        for n in range(3)
        for category in ("writing", "math")
    ]
    return write_rows(tmp_path / "questions.jsonl", rows)


def echo(request: Request, seed: int) -> str:
    return "re: " + request.messages[-1].content


def by_turn(prompt: object, answer: str) -> float:
    """Writing 5 and 3, mathematics 1 and 1."""
    if "math" in answer:
        return 1.0
    return 5.0 if "first" in answer else 3.0


def test_scores_by_turn_and_category_on_the_scale_of_mt_bench(data: str, tmp_path: Path) -> None:
    measure = MtBench(data=data, judge_range=(1, 5), chunk=2)
    measure.check()
    found = measure.run(subject(tmp_path / "work", echo, ListJudge(by_turn)))
    assert {name: e.value for name, e in found.estimates.items()} == {
        "mt_bench": 4.375,
        "mt_bench_turn_1": 5.5,
        "mt_bench_turn_2": 3.25,
        "mt_bench_writing": 7.75,
        "mt_bench_math": 1.0,
    }
    assert found.estimates["mt_bench"].count == 6
    assert found.facts is not None
    assert found.facts["scale"] == "1 to 10, in proportion to the judge's 1 to 5"


def test_the_second_turn_is_judged_within_the_conversation_and_with_its_own_reference(
    data: str, tmp_path: Path
) -> None:
    judge = ListJudge(by_turn)
    MtBench(data=data).run(subject(tmp_path / "work", echo, judge))
    prompt, answer = next(row for row in judge.seen if row[0].id == "math-1/2")
    assert [(m.role, m.content) for m in prompt.messages] == [
        ("user", "math first 1"),
        ("assistant", "re: math first 1"),
        ("user", "math second 1"),
    ]
    assert (answer, prompt.target) == ("re: math second 1", "five")
    writing = next(prompt for prompt, _ in judge.seen if prompt.id == "writing-0/1")
    assert writing.target is None


def test_scores_without_a_range_are_not_called_mt_bench(data: str, tmp_path: Path) -> None:
    found = MtBench(data=data).run(subject(tmp_path / "work", echo, ListJudge(lambda p, a: 37.0)))
    assert found.estimates["judge_score"].value == 37.0
    assert not [name for name in found.estimates if name.startswith("mt_bench")]
    assert found.facts is not None
    assert "no MT-Bench score" in found.facts["scale"]
    with pytest.raises(JudgeError, match=r"gave 37, outside judge_range \[1, 5\]"):
        MtBench(data=data, judge_range=(1, 5)).run(
            subject(tmp_path / "range", echo, ListJudge(lambda p, a: 37.0))
        )


class Listening(FakeEngine):
    """Notes the temperature and seed of each call, by the first word of the conversation."""

    def __init__(self) -> None:
        super().__init__(echo)
        self.seen: list[tuple[str, float, int]] = []

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = ""
    ) -> list[Response]:
        category = requests[0].messages[0].content.split()[0]
        self.seen.append((category, sampling.temperature, seed))
        return super().sample(requests, sampling, seed=seed, label=label)


def listened(data: str, folder: Path, seed: int) -> list[tuple[str, float, int]]:
    engine = Listening()
    one = subject(folder, None, ListJudge(lambda p, a: 3.0))
    MtBench(data=data, chunk=2).run(replace(one, engine=engine, seed=seed))
    return engine.seen


def test_each_category_is_drawn_at_fastchats_temperature(data: str, tmp_path: Path) -> None:
    calls = listened(data, tmp_path / "work", 0)
    assert {(category, temperature) for category, temperature, _ in calls} == {
        ("writing", 0.7),
        ("math", 0.0),
    }


def test_every_chunk_and_turn_has_its_own_seed_from_the_evaluations(
    data: str, tmp_path: Path
) -> None:
    first = [seed for *_, seed in listened(data, tmp_path / "zero", 0)]
    other = [seed for *_, seed in listened(data, tmp_path / "one", 1)]
    assert len(first) == 2 * 2 * 2  # categories, chunks, turns
    assert len({*first, *other}) == len(first) + len(other)


def test_a_killed_measure_goes_on_and_ends_in_the_same_outcome(data: str, tmp_path: Path) -> None:
    measure = MtBench(data=data, judge_range=(1, 5), chunk=1)
    with pytest.raises(KeyboardInterrupt):
        measure.run(subject(tmp_path / "work", None, ListJudge(KilledAt(6, by_turn))))
    rest = ListJudge(by_turn)
    resumed = measure.run(subject(tmp_path / "work", None, rest))
    assert len(rest.seen) == 12 - 4
    assert resumed == measure.run(subject(tmp_path / "unbroken", None, ListJudge(by_turn)))


def test_an_answer_without_a_verdict_is_counted_and_no_score_is_made_up(
    data: str, tmp_path: Path
) -> None:
    def rate(prompt: object, answer: str) -> float | NoVerdict:
        return NoVerdict("undecided") if "second 0" in answer else 3.0

    found = MtBench(data=data, judge_range=(1, 5)).run(
        subject(tmp_path / "work", echo, ListJudge(rate))
    )
    counts = {name: e.count for name, e in found.estimates.items()}
    assert (counts["mt_bench"], counts["mt_bench_turn_1"], counts["mt_bench_turn_2"]) == (4, 6, 4)
    assert found.facts is not None
    assert found.facts["no_verdict"] == {"undecided": 2}


def test_a_judge_that_only_compares_is_refused_with_its_reason(data: str, tmp_path: Path) -> None:
    silent = ListJudge(lambda prompt, answer: NoVerdict("nothing to compare with"))
    with pytest.raises(JudgeError, match=r"\(nothing to compare with\); use one that scores"):
        MtBench(data=data).run(subject(tmp_path / "work", echo, silent))
    with pytest.raises(JudgeError, match="needs a judge"):
        MtBench(data=data).run(subject(tmp_path / "work", echo))


def test_what_is_wrong_with_a_row_is_said_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no file"):
        MtBench().check()
    row = {"id": "a", "category": "math", "turns": ["only one"]}
    with pytest.raises(DataError, match=r"q\.jsonl:1 has no list of two texts"):
        MtBench(data=write_rows(tmp_path / "q.jsonl", [row])).check()
    row = {"id": "a", "category": "math", "turns": ["one", "two"], "reference": ["x"]}
    with pytest.raises(DataError, match="neither empty nor one for each turn"):
        MtBench(data=write_rows(tmp_path / "q.jsonl", [row])).check()
    row = {"id": "a", "category": "math", "turns": ["one", "two"]}
    with pytest.raises(DataError, match=r"q\.jsonl:2 repeats the id 'a'"):
        MtBench(data=write_rows(tmp_path / "q.jsonl", [row, row])).check()
