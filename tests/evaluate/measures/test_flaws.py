"""Flaws of a run's pairs: read, told apart, scored, shown to a judge, put beside a file's and beside an annotator's labels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import DataError
from prefloop.evaluate.measures import Subject
from prefloop.evaluate.measures.flaws import (
    STATIC,
    Flaws,
    agreement_of_kinds,
)
from prefloop.generate.engines.fake import FakeEngine
from prefloop.judges import NoVerdict, Verdict
from prefloop.records import (
    Candidates,
    Message,
    Pair,
    Prompt,
    Request,
    Response,
    Scored,
    write_jsonl,
)
from prefloop.run_folder import RoundDir

GOOD = "Mercury is the closest planet to the Sun, 58 million kilometres away."
FLAWED = {
    "number": GOOD.replace("58", "85"),
    "factual": GOOD.replace("Mercury", "Venus"),
    "rewritten": "That depends on who you ask and when.",
}


def question(n: int) -> Message:
    return Message(role="user", content=f"Which planet is closest, {n}?")


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs_file(folder: Path) -> str:
    rows = [
        {"prompt": question(n).content, "chosen": GOOD, "rejected": text, "label": kind}
        for n, (kind, text) in enumerate(FLAWED.items())
    ]
    return write(folder / "pairs.jsonl", rows)


def example(folder: Path) -> dict[str, Any]:
    """For the contract's checks."""
    return {"pairs": pairs_file(folder)}


def make_run(folder: Path, flaws: Sequence[str], origin: str = "flawed", rounds: int = 1) -> str:
    """A run's folder as far as this measure reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("name: r\nmethod: {name: arop}\n")
    for number in range(rounds):
        round_dir = RoundDir(folder / "rounds" / f"{number:04d}", number)
        round_dir.path.mkdir(parents=True)
        prompts = [Prompt(id=str(n), messages=(question(n),)) for n in range(len(flaws))]
        groups = [Candidates(prompt=p, responses={"refined": Response(text=GOOD)}) for p in prompts]
        pairs = [
            Pair(
                prompt_id=prompt.id,
                round=number,
                prompt=prompt.messages,
                chosen=GOOD,
                rejected=flaw,
                origin={"chosen": "refined", "rejected": origin},
            )
            for prompt, flaw in zip(prompts, flaws, strict=True)
        ]
        for stage, records in (("ranked", groups), ("pairs", pairs)):
            write_jsonl(round_dir.path / f"{stage}.jsonl", records)
            round_dir.finish(stage, records=len(records))
    return str(folder)


class Likes(FakeEngine):
    """An engine that finds answers of Mercury likelier, and answers "B" to questions with letters."""

    def score(
        self, requests: Sequence[Request], answers: Sequence[Response], *, top: int = 0
    ) -> list[Scored]:
        return [
            Scored(
                token_ids=(1,),
                offsets=((0, 1),),
                logprobs=(-1.0 if "Mercury" in answer.text else -3.0,),
            )
            for answer in answers
        ]

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        rows = [tuple(0.5 * (option == "B") for option in options) for _ in requests]
        return [
            row if "85" in r.messages[-1].content else (0.0,) * 9
            for row, r in zip(rows, requests, strict=True)
        ]


class First:
    """A judge that sees wrong numbers, has no verdict on rewrites, and else prefers what is shown first."""

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return [self._one(group) for group in groups]

    def _one(self, group: Sequence[str]) -> Verdict:
        if FLAWED["rewritten"] in group:
            return NoVerdict("bored")
        if FLAWED["number"] in group:
            return tuple(float("58" in text) for text in group)
        return (1.0, 0.0)


def subject(folder: Path, judge: Any = None) -> Subject:
    engine = Likes()
    return Subject("it", engine, None, None, None, judge, folder, 0)


def test_a_runs_flaws_are_told_apart_and_weighed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [*FLAWED.values(), FLAWED["number"]])
    found = Flaws(of=run).run(subject(tmp_path / "kept", First()))
    values = {name: estimate.value for name, estimate in found.estimates.items()}
    assert (values["number"], values["factual"], values["rewritten"]) == (0.5, 0.25, 0.25)
    assert values["toxic"] == values["other"] == 0.0
    # Two nats for Venus and the rewrite, none for the number.
    assert values["gap"] == 1.0
    assert values["unseen"] == 0.5
    # Both numbers are seen, of the planet the order decides, the rewrite has no verdict.
    assert values["judge_sees"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert values["no_verdict"] == 0.25
    assert not any(name.startswith(STATIC) for name in values)
    assert found.facts is not None
    assert found.facts["kinds"] == {"round 0": {"number": 2, "factual": 1, "rewritten": 1}}


def test_a_static_set_stands_beside_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [FLAWED["number"]], rounds=2)
    found = Flaws(of=run, pairs=pairs_file(tmp_path)).run(subject(tmp_path / "kept"))
    values = {name: estimate.value for name, estimate in found.estimates.items()}
    assert (values["number"], values["static_number"]) == (1.0, pytest.approx(1 / 3))
    assert found.estimates["gap"].count == 2
    assert found.estimates["static_gap"].count == 3
    assert "judge_sees" not in values
    assert "static_no_verdict" not in values


def test_pairs_that_no_method_flawed_are_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", list(FLAWED.values()), origin="draft")
    lacks = Flaws(of=run).lacks(subject(tmp_path))
    assert lacks is not None
    assert "no pairs with planted flaws" in lacks
    assert Flaws(of=run, pairs=pairs_file(tmp_path)).lacks(subject(tmp_path)) is None


def test_a_further_round_is_another_result(tmp_path: Path) -> None:
    one = Flaws(of=make_run(tmp_path / "one", [FLAWED["number"]]))
    two = Flaws(of=make_run(tmp_path / "two", [FLAWED["number"]], rounds=2))
    assert one.reads() != two.reads() != Flaws().reads()


def test_rules_and_a_model_are_put_beside_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefloop.generate.hf_engine.open_engine", lambda name: Likes())
    pairs = pairs_file(tmp_path)
    measure = Flaws(pairs=pairs, labels=pairs, classifier="embedded:x")
    facts = measure.run(subject(tmp_path / "kept")).facts
    assert facts is not None
    assert facts["rules_and_labels"]["accuracy"]["value"] == 1.0
    assert facts["rules_and_labels"]["kappa"]["value"] == 1.0
    # The model answers for the number alone, and is right there.
    by_model = facts["classifier_and_labels"]
    assert by_model["no_answer"] == 2
    assert by_model["confusion"] == {"number": {"number": 1}}
    assert facts["classifier_and_rules"] == by_model


def test_an_unknown_label_is_named_with_its_row(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b", "label": "funny"}]
    with pytest.raises(DataError, match=r"rows\.jsonl:1.*'funny'.*factual, number"):
        Flaws(labels=write(tmp_path / "rows.jsonl", rows)).check()


def test_agreement_is_counted_by_hand() -> None:
    """Three of four agree; by chance (2/4 * 1/4 + 2/4 * 3/4) = 1/2 would, so kappa is 1/2."""
    found = agreement_of_kinds(["a", "a", "b", "b", "b"], ["a", "b", "b", "b", None], 0)
    assert (found["pairs"], found["no_answer"]) == (5, 1)
    assert found["accuracy"]["value"] == 0.75
    assert math.isclose(found["kappa"]["value"], 0.5)
    assert found["confusion"] == {"a": {"a": 1, "b": 1}, "b": {"b": 2}}
