"""`prefloop judge check`: baselines, position bias, failures, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefloop import cli
from prefloop.errors import DataError, PrefloopError, RecipeError
from prefloop.evaluate.judge_check import (
    CHANCE,
    LONGER,
    check_judges,
    load_pairs,
    parse_judge,
    with_targets,
)
from prefloop.judges.python import Python
from prefloop.judges.similarity import Similarity
from prefloop.records import Prompt


def says_good(prompt: Prompt, responses: list[str]) -> list[float]:
    """A judge that is right about these pairs."""
    return [float("good" in text) for text in responses]


def first_one(prompt: Prompt, responses: list[str]) -> list[float]:
    """A judge that always takes what is shown first."""
    return [float(len(responses) - place) for place in range(len(responses))]


def fails_on_odd(prompt: Prompt, responses: list[str]) -> list[float]:
    """A judge without a number for every second pair."""
    odd = int(prompt.messages[0].content.split()[-1]) % 2
    return [float("nan") if odd else float("good" in text) for text in responses]


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [
        {
            "id": str(n),
            "prompt": f"question {n}",
            "chosen": "good" + " and long" * (n % 4 == 0),
            "rejected": "bad, but longer",
        }
        for n in range(40)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def judge(function: Any) -> Python:
    return Python(function=f"{__name__}:{function.__name__}")


def test_a_judge_stands_beside_chance_and_the_longer_answer(file):
    report = check_judges({"mine": judge(says_good)}, load_pairs([file], None, 0))
    assert list(report) == [CHANCE, LONGER, "mine"]
    assert report[CHANCE]["pairs"]["agreement"]["value"] == 0.5
    assert report[LONGER]["pairs"]["agreement"]["value"] == 0.0
    row = report["mine"]["pairs"]
    assert row["agreement"]["value"] == 1.0
    assert row["over_longer"]["value"] == 1.0
    assert row["prefers_longer"]["value"] == 0.0


def test_a_judge_that_takes_the_first_gains_nothing_from_the_files_order(file):
    row = check_judges({"first": judge(first_one)}, load_pairs([file], None, 0))["first"]["pairs"]
    assert 0.2 < row["agreement"]["value"] < 0.8
    both = check_judges({"first": judge(first_one)}, load_pairs([file], None, 0), both_orders=True)
    assert both["first"]["pairs"]["position"]["first_wins"] == 1.0
    assert both["first"]["pairs"]["agreement"] == row["agreement"]


def test_a_steady_judge_shows_no_position_bias(file):
    pairs = load_pairs([file], None, 0)
    report = check_judges({"mine": judge(says_good)}, pairs, both_orders=True)
    assert report["mine"]["pairs"]["position"] == {"first_wins": 0.5, "changed": 0.0, "pairs": 40.0}


def test_failures_are_counted_and_not_scored(file):
    report = check_judges({"half": judge(fails_on_odd)}, load_pairs([file], None, 0))
    row = report["half"]["pairs"]
    assert row["failures"]["value"] == 0.5
    assert sum(row["reasons"].values()) == 20
    assert row["agreement"]["value"] == 1.0
    assert row["agreement"]["count"] == 20


def test_several_data_sets_have_a_part_each_and_one_for_all(file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "q 1", "chosen": "bad", "rejected": "good"}) + "\n")
    report = check_judges({"mine": judge(says_good)}, load_pairs([file, str(other)], None, 0))
    assert list(report["mine"]) == ["pairs", "other", "all"]
    assert report["mine"]["other"]["agreement"]["value"] == 0.0
    assert report["mine"]["all"]["agreement"]["count"] == 41


def test_a_limit_draws_by_the_seed(file):
    first, again = load_pairs([file], 10, 0), load_pairs([file], 10, 0)
    assert len(first) == 10
    assert first == again != load_pairs([file], 10, 1)


def test_a_judge_that_needs_a_target_or_a_policy_says_so(file):
    pairs = load_pairs([file], None, 0)
    with pytest.raises(DataError, match="have none"):
        check_judges({"similarity": Similarity()}, pairs)
    with pytest.raises(PrefloopError, match="--policy"):
        check_judges(dict([parse_judge("self_judge")]), pairs)


def test_targets_are_matched_by_prompt_and_answers_that_are_the_target_left_out(file, tmp_path):
    targets = tmp_path / "targets.jsonl"
    rows = [("question  3", "so good"), ("question 4", "bad, but longer"), ("question x", "good")]
    targets.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows))
    (pair,) = with_targets(load_pairs([file], None, 0), str(targets))
    assert (pair.id, pair.target) == ("3", "so good")
    report = check_judges({"similarity": Similarity()}, [pair])
    assert report["similarity"]["pairs"]["agreement"]["value"] == 1.0
    targets.write_text(json.dumps({"prompt": "other", "response": "x"}) + "\n")
    with pytest.raises(DataError, match="none of these pairs' prompts"):
        with_targets(load_pairs([file], None, 0), str(targets))


def test_a_judge_is_named_or_given_as_a_section_or_a_file(tmp_path):
    assert parse_judge("similarity") == ("similarity", Similarity())
    name, found = parse_judge("{name: similarity, word_order: 2}")
    assert (name, found) == ("similarity (word_order 2)", Similarity(word_order=2))
    assert parse_judge("similarity", ["word_order=2"])[1] == Similarity(word_order=2)
    section = tmp_path / "judge.yaml"
    section.write_text("name: similarity\nword_order: 1\n")
    assert parse_judge(str(section))[1] == Similarity(word_order=1)
    section.write_text("method: {name: ial}\njudge: {name: similarity}\n")
    assert parse_judge(str(section))[1] == Similarity()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("similarty", "did you mean 'similarity'"),
        ("{word_order: 2}", "section with a name"),
        ("nowhere.yaml", "no file nowhere.yaml"),
    ],
)
def test_a_judge_that_is_not_there_is_one_sentence(text, says):
    with pytest.raises(RecipeError, match=says):
        parse_judge(text)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["prefloop", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_command_prints_a_table_or_json(file, monkeypatch, capsys):
    spec = f"{{name: python, function: '{__name__}:says_good'}}"
    assert run(monkeypatch, "judge", "check", spec, "--data", file) == 0
    out = capsys.readouterr().out
    assert "pairs: 40 pairs" in out
    (line,) = [line for line in out.splitlines() if line.startswith("python")]
    assert " 1.000  1.000 to 1.000  " in line
    assert run(monkeypatch, "judge", "check", spec, "--data", file, "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) > {CHANCE, LONGER}


def test_a_users_error_is_one_sentence_and_exit_code_2(file, monkeypatch, capsys):
    assert run(monkeypatch, "judge", "check", "similarity", "--data", f"{file}x") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert run(monkeypatch, "reward", "train", "nothing") == 2
    assert "no reward recipe 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("judge", "check"), ("reward", "train")])
def test_the_verbs_have_help(words, monkeypatch, capsys):
    assert run(monkeypatch, *words, "--help") == 0
    assert f"Usage: prefloop {' '.join(words)}" in capsys.readouterr().out
