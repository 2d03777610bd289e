"""The measure win_rate: opponents, both orders, ties, failures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import DataError, JudgeError
from prefloop.evaluate.measures import Subject
from prefloop.evaluate.measures.win_rate import WinRate
from prefloop.generate.engines.fake import FakeEngine
from prefloop.judges import NoVerdict, Verdict
from prefloop.records import Prompt, Request

PROMPTS = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(8)]


class Judge:
    """Scores a group by a function of its texts in the order in which they are shown; remembers what it saw."""

    def __init__(self, score: Callable[[Sequence[str]], Verdict]) -> None:
        self._score = score
        self.seen: list[tuple[str, ...]] = []

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        self.seen += [tuple(group) for group in groups]
        return [self._score(group) for group in groups]


def longest(group: Sequence[str]) -> Verdict:
    return tuple(float(len(text)) for text in group)


def first_shown(group: Sequence[str]) -> Verdict:
    return (1.0, 0.0)


def subject(
    folder: Path, judge: Any, answer: Callable[[Request, int], str], **more: Any
) -> Subject:
    engine = FakeEngine(answer)
    values: dict[str, Any] = {
        "name": "s",
        "engine": engine,
        "initial": FakeEngine(lambda request, seed: "what it said before"),
        "model": None,
        "tokenizer": None,
        "judge": judge,
        "folder": folder,
        "seed": 0,
        **more,
    }
    return Subject(**values)


def says(text: str) -> Callable[[Request, int], str]:
    return lambda request, seed: text


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return str(path)


def test_it_wins_against_the_start_where_the_judge_says_so(prompts: str, tmp_path: Path) -> None:
    long = subject(tmp_path / "k", Judge(longest), says("a much longer answer than before"))
    outcome = WinRate(held_out=prompts).run(long)
    assert outcome.estimates["win_rate"].value == 1.0
    assert outcome.estimates["length_difference"].value == 13.0
    assert outcome.estimates["order_changes"].value == 0.0
    assert outcome.estimates["no_verdict"].value == 0.0
    assert outcome.items[0].texts["opponent"] == "what it said before"


def test_a_judge_that_takes_what_is_shown_first_makes_a_draw_of_both_orders(
    prompts: str, tmp_path: Path
) -> None:
    judge = Judge(first_shown)
    outcome = WinRate(held_out=prompts).run(subject(tmp_path / "k", judge, says("mine")))
    assert outcome.estimates["win_rate"].value == 0.5
    assert outcome.estimates["order_changes"].value == 1.0
    assert judge.seen[0] == judge.seen[8][::-1]
    single = WinRate(held_out=prompts, both_orders=False)
    assert single.run(subject(tmp_path / "j", judge, says("mine"))).estimates["win_rate"].value == 1


def test_equal_texts_are_a_tie_that_nobody_is_asked_about(prompts: str, tmp_path: Path) -> None:
    judge = Judge(first_shown)
    same = subject(tmp_path / "k", judge, says("what it said before"))
    outcome = WinRate(held_out=prompts).run(same)
    assert outcome.estimates["win_rate"].value == 0.5
    assert judge.seen == []


def test_equal_scores_are_a_tie(prompts: str, tmp_path: Path) -> None:
    judge = Judge(lambda group: (0.3, 0.3))
    outcome = WinRate(held_out=prompts).run(subject(tmp_path / "k", judge, says("mine")))
    assert outcome.estimates["win_rate"].value == 0.5
    assert outcome.facts is not None
    assert outcome.facts["ties"] == 8


def test_what_has_no_verdict_is_counted_and_in_no_other_figure(
    prompts: str, tmp_path: Path
) -> None:
    def fails_sometimes(group: Sequence[str]) -> Verdict:
        return NoVerdict("no number") if "question 3" in " ".join(group) else longest(group)

    echo = subject(
        tmp_path / "k",
        Judge(fails_sometimes),
        lambda r, s: r.messages[-1].content + " and more text",
    )
    outcome = WinRate(held_out=prompts).run(echo)
    assert outcome.estimates["win_rate"].count == 7
    assert outcome.estimates["win_rate"].value == 1.0
    assert outcome.estimates["no_verdict"].value == 1 / 8
    assert outcome.facts is not None
    assert outcome.facts["no_verdict"] == {"no number": 1}


def test_one_order_without_a_verdict_is_no_verdict(prompts: str, tmp_path: Path) -> None:
    judge = Judge(lambda group: longest(group) if group[0] == "mine" else NoVerdict("tired"))
    with pytest.raises(JudgeError, match="no verdict on any of the 8 prompts"):
        WinRate(held_out=prompts).run(subject(tmp_path / "k", judge, says("mine")))


def test_the_prompts_own_responses_can_be_the_opponent(prompts: str, tmp_path: Path) -> None:
    outcome = WinRate(held_out=prompts, opponent="targets").run(
        subject(tmp_path / "k", Judge(longest), says("answer"), initial=None)
    )
    assert outcome.estimates["win_rate"].value == 0.0
    assert outcome.items[2].texts["opponent"] == "answer 2"


def test_stored_answers_are_matched_by_prompt(prompts: str, tmp_path: Path) -> None:
    stored = tmp_path / "stored.jsonl"
    rows = [{"prompt": row["prompt"], "response": "other " * 9} for row in reversed(PROMPTS)]
    stored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measure = WinRate(held_out=prompts, opponent=str(stored))
    measure.check()
    outcome = measure.run(subject(tmp_path / "k", Judge(longest), says("short")))
    assert outcome.estimates["win_rate"].value == 0.0
    stored.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="no response to 7 of 8 prompts"):
        measure.check()
    stored.unlink()
    with pytest.raises(DataError, match=r"no file or folder .*stored\.jsonl"):
        measure.check()


def test_prompts_without_a_response_cannot_be_the_opponent(tmp_path: Path) -> None:
    path = tmp_path / "bare.jsonl"
    path.write_text(json.dumps(PROMPTS[0]) + '\n{"prompt": "bare"}\n')
    with pytest.raises(DataError, match="1 of 2 prompts have no response"):
        WinRate(held_out=str(path), opponent="targets").check()


def test_without_a_start_it_says_what_to_name(prompts: str, tmp_path: Path) -> None:
    alone = subject(tmp_path / "k", Judge(longest), says("a"), initial=None)
    assert "--initial" in (WinRate(held_out=prompts).lacks(alone) or "")
    assert WinRate(held_out=prompts, opponent="targets").lacks(alone) is None
    unjudged = subject(tmp_path / "j", None, says("a"))
    assert "--judge" in (WinRate(held_out=prompts).lacks(unjudged) or "")


def test_one_prompt_is_measured_and_has_no_width(prompts: str, tmp_path: Path) -> None:
    one = subject(tmp_path / "k", Judge(longest), says("a much longer answer than before"))
    outcome = WinRate(held_out=prompts, limit=1).run(one)
    found = outcome.estimates["win_rate"]
    assert (found.value, found.low, found.high, found.count) == (1.0, 1.0, 1.0, 1)


def test_a_verdict_that_is_kept_is_not_asked_for_again(prompts: str, tmp_path: Path) -> None:
    first, second = Judge(longest), Judge(longest)
    measure = WinRate(held_out=prompts, chunk=3)
    before = measure.run(subject(tmp_path / "k", first, says("mine")))
    (kept,) = [
        p
        for p in (tmp_path / "k").iterdir()
        if (p / "00002.jsonl").exists() and "win_rate" in (p / "00002.jsonl").read_text()
    ]
    for path in kept.glob("00002.*"):
        path.unlink()
    assert measure.run(subject(tmp_path / "k", second, says("mine"))) == before
    assert len(first.seen) == 16
    assert len(second.seen) == 4
