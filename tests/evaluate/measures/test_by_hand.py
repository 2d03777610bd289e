"""The measures preferences, divergence and health, against values worked out by hand."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import DataError
from prefloop.evaluate.measures import Subject
from prefloop.evaluate.measures.divergence import Divergence
from prefloop.evaluate.measures.health import Health, distinct_2_estimate
from prefloop.evaluate.measures.preferences import Preferences
from prefloop.generate.engines.fake import FakeEngine
from prefloop.records import Request, Response, Sampling, Scored


class Words:
    """An engine with a fixed log-prob for each word, and one for end-of-turn, that says what it is told."""

    def __init__(self, logps: dict[str, float], answers: Sequence[Response] = ()) -> None:
        self.logps = logps
        self.answers = answers
        self.asked: list[Sampling] = []

    def sample(self, requests: Sequence[Request], sampling: Sampling, **_: Any) -> list[Response]:
        self.asked.append(sampling)
        return [self.answers[int(r.messages[-1].content.split()[-1])] for r in requests]

    def score(
        self, requests: Sequence[Request], answers: Sequence[Response], **_: Any
    ) -> list[Scored]:
        return [self._scored(answer) for answer in answers]

    def _scored(self, answer: Response) -> Scored:
        words = answer.text.split() + ["<end>"] * (answer.finish == "stop")
        logprobs = tuple(self.logps[word] for word in words)
        return Scored(token_ids=(0,) * len(words), offsets=(), logprobs=logprobs)


def subject(folder: Path, engine: Any, initial: Any = None) -> Subject:
    return Subject("s", engine, initial, None, None, None, folder, 0)


def rows(path: Path, values: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return str(path)


def test_acs_by_hand(tmp_path: Path) -> None:
    data = rows(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": "p", "chosen": "good good", "rejected": "bad"},
            {"prompt": "p", "chosen": "bad", "rejected": "good"},
            {"prompt": "q", "chosen": "same", "rejected": "same same"},
        ],
    )
    now = Words({"good": -1.0, "bad": -4.0, "same": -2.0, "<end>": -0.5})
    before = Words({"good": -2.0, "bad": -3.0, "same": -2.0, "<end>": -0.5})
    outcome = Preferences(data=data, beta=0.5).run(subject(tmp_path / "k", now, before))
    # r(good) = 1, r(bad) = -1, r(same) = 0: 0.5 (2 - -1), 0.5 (-1 - 1), 0.
    assert [item.values["acs"] for item in outcome.items] == [1.5, -1.0, 0.0]
    assert outcome.estimates["acs"].value == pytest.approx(0.5 / 3)
    assert outcome.estimates["pair_accuracy"].value == 0.5
    assert outcome.items[0].cluster == outcome.items[1].cluster != outcome.items[2].cluster


def test_ties_of_people_are_left_out_and_a_limit_draws_the_same_pairs(tmp_path: Path) -> None:
    pairs: list[dict[str, Any]] = [
        {"prompt": f"p {n}", "chosen": f"a {n}", "rejected": "b", "tie": n == 4} for n in range(9)
    ]
    data = rows(tmp_path / "pairs.jsonl", pairs)
    fake = FakeEngine()
    whole = Preferences(data=data).run(subject(tmp_path / "k", fake, fake))
    assert len(whole.items) == 8
    some = Preferences(data=data, limit=3)
    first = some.run(subject(tmp_path / "k", fake, fake))
    assert len(first.items) == 3
    assert some.run(subject(tmp_path / "j", fake, fake)) == first
    only_ties = rows(tmp_path / "ties.jsonl", [pairs[4]])
    with pytest.raises(DataError, match="ties only"):
        Preferences(data=only_ties).check()


def test_kl_by_hand_leaves_out_the_end_that_was_cut_off(tmp_path: Path) -> None:
    data = rows(tmp_path / "p.jsonl", [{"prompt": "say 0"}, {"prompt": "say 1"}])
    answers = [
        Response(text="a a", token_ids=(1, 1, 0)),
        Response(text="b", token_ids=(2,), finish="length"),
    ]
    now = Words({"a": -1.0, "b": -1.0, "<end>": -1.0}, answers)
    before = Words({"a": -1.5, "b": -3.0, "<end>": -11.0})
    outcome = Divergence(held_out=data, max_new_tokens=9).run(subject(tmp_path / "k", now, before))
    # 2 * 0.5 + 10 for the answer that ended, 2 for the one that was cut off.
    assert [item.values["kl_answer"] for item in outcome.items] == [11.0, 2.0]
    assert outcome.estimates["kl_answer"].value == 6.5
    assert outcome.estimates["kl"].value == 13 / 4
    assert now.asked == [Sampling(temperature=1.0, max_new_tokens=9)]


def test_health_counts_what_was_answered(tmp_path: Path) -> None:
    data = rows(tmp_path / "p.jsonl", [{"prompt": f"say {n}"} for n in range(3)])
    answers = [
        Response(text="red red red", token_ids=(1, 1, 1, 0)),
        Response(text="red red blue", token_ids=(1, 1, 2), finish="length"),
        Response(text="", token_ids=(0,)),
    ]
    outcome = Health(held_out=data).run(subject(tmp_path / "k", Words({}, answers)))
    values = {name: found.value for name, found in outcome.estimates.items()}
    assert values["mean_length"] == pytest.approx(8 / 3)
    assert values["stop_rate"] == pytest.approx(2 / 3)
    assert values["distinct_2"] == 2 / 4
    assert outcome.facts is not None
    assert outcome.facts["empty"] == 1


def test_distinct_2_has_the_jackknifes_interval() -> None:
    texts = ["a b c", "a b d", "b c d a", "x y"]
    found = distinct_2_estimate([Response(text=text) for text in texts])
    assert found is not None

    def share(chosen: list[str]) -> float:
        pairs = [p for text in chosen for p in zip(text.split(), text.split()[1:], strict=False)]
        return len(set(pairs)) / len(pairs)

    left = [share(texts[:n] + texts[n + 1 :]) for n in range(4)]
    error = math.sqrt(3 / 4 * sum((value - sum(left) / 4) ** 2 for value in left))
    assert found.value == share(texts)
    assert found.low == pytest.approx(max(0.0, found.value - 1.96 * error))
    assert found.high == pytest.approx(min(1.0, found.value + 1.96 * error))
    assert distinct_2_estimate([Response(text="one")]) is None
    single = distinct_2_estimate([Response(text="one two")])
    assert single is not None
    assert single.low == single.high == 1.0


def test_distinct_2_of_many_answers_takes_no_more_than_its_share_of_time() -> None:
    def seconds(count: int) -> float:
        answers = [Response(text=" ".join(f"{n}-{w}" for w in range(60))) for n in range(count)]
        start = time.process_time()
        distinct_2_estimate(answers)
        return time.process_time() - start

    # 32 times as many answers; work that grew with their square took over 1,000 times as long.
    assert min(seconds(1600) for _ in range(2)) < 400 * min(seconds(50) for _ in range(3))


def test_answers_are_drawn_once_for_measures_that_share_them(tmp_path: Path) -> None:
    data = rows(tmp_path / "p.jsonl", [{"prompt": f"say {n}"} for n in range(3)])
    engine = Words({}, [Response(text="a b", token_ids=(1, 2, 0))] * 3)
    shared = Subject(
        "s", engine, None, None, None, None, tmp_path / "k", 0, answers=tmp_path / "answers"
    )
    measure = Health(held_out=data, chunk=2)
    first = measure.run(shared)
    elsewhere = Subject(
        "s", engine, None, None, None, None, tmp_path / "j", 0, answers=tmp_path / "answers"
    )
    assert measure.run(elsewhere) == first
    assert len(engine.asked) == 2
