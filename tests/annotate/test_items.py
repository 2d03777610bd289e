"""Which answers are compared: rounds of runs, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefloop.annotate.items import read_comparison
from prefloop.errors import DataError, RunFolderError
from prefloop.records import Candidates, Message, Prompt, Response, write_jsonl
from prefloop.run_folder import open_run


def make_run(path: Path, rounds: dict[int, list[str]], finished: bool = True) -> str:
    """A run whose held-out answers are given by round; -1 is the start."""
    with open_run(path, "name: run\n") as run:
        for number, answers in rounds.items():
            round_dir = run.round(number)
            groups = [
                Candidates(
                    prompt=Prompt(id=f"p{n}", messages=(Message(role="user", content=f"q{n}"),)),
                    responses={"answer": Response(text=text)},
                )
                for n, text in enumerate(answers)
            ]
            write_jsonl(round_dir.path / "answers.jsonl", groups)
            if finished:
                round_dir.finish("answers")
    return str(path)


def test_the_last_rounds_are_compared_and_other_rounds_can_be_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {-1: ["start"], 0: ["zero"], 1: ["one"]})
    other = make_run(tmp_path / "other", {0: ["other"]})
    found = read_comparison(run, other)
    assert found.names == {"a": f"{run}@1", "b": f"{other}@0"}
    assert found.items["p0"].answers == {"a": "one", "b": "other"}
    found = read_comparison(f"{run}@start", f"{run}@0")
    assert found.items["p0"].answers == {"a": "start", "b": "zero"}


def test_answers_in_the_same_words_are_counted_and_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {0: ["same  words", "x"], 1: ["same words\n", "y"]})
    found = read_comparison(f"{run}@0", run)
    assert (list(found.items), found.identical) == (["p1"], 1)
    with pytest.raises(DataError, match="nothing is left to compare"):
        read_comparison(
            make_run(tmp_path / "same", {0: ["x"]}), make_run(tmp_path / "too", {0: ["x"]})
        )


def test_files_are_matched_by_prompt_whatever_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "one", "answer": "1"},
        {"prompt": [{"role": "user", "content": "two"}], "answer": "", "id": "second"},
    ]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("b.jsonl").write_text(
        '{"prompt": "two", "answer": "II"}\n{"prompt": "one", "answer": "\\n"}\n'
    )
    found = read_comparison("a.jsonl", "b.jsonl")
    assert {id: dict(item.answers) for id, item in found.items.items()} == {
        "a-1": {"a": "1", "b": "\n"},
        "second": {"a": "", "b": "II"},
    }


def test_other_prompts_are_refused_with_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {0: ["x", "y", "z"]})
    (tmp_path / "b.jsonl").write_text(
        '{"prompt": "q1", "answer": "b"}\n{"prompt": "new", "answer": "b"}\n'
    )
    with pytest.raises(DataError, match="1 in both, 2 only in the first, 1 only in the second"):
        read_comparison(run, str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"prompt": "q"}', "a.jsonl:1: 'answer' is NoneType, not text"),
        ('{"answer": "x"}', "a.jsonl:1: 'prompt' is NoneType"),
        ('{"prompt": "q", "answer": "x"}\n{"prompt": "q", "answer": "y"}', "'a-2' twice"),
        ('{"prompt": "q", "answer": "\\ud800"}', "half of a surrogate pair"),
        ("", "holds no answers"),
    ],
)
def test_a_bad_row_is_named(row: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(row)
    with pytest.raises(DataError, match=says):
        read_comparison(str(tmp_path / "a.jsonl"), "b.jsonl")


def test_a_round_without_finished_answers_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {0: ["x"], 1: ["y"]})
    (tmp_path / "run/rounds/0001/answers.done.json").unlink()
    assert (
        read_comparison(f"{run}@0", make_run(tmp_path / "b", {0: ["z"]})).names["a"] == f"{run}@0"
    )
    with pytest.raises(RunFolderError, match=r"no held-out answers of round 1; it has: 0"):
        read_comparison(f"{run}@1", run)
    bare = make_run(tmp_path / "bare", {0: ["x"]}, finished=False)
    with pytest.raises(RunFolderError, match="no held-out answers yet"):
        read_comparison(bare, run)
    with pytest.raises(DataError, match="both sides are"):
        read_comparison(run, f"{run}@0")
    with pytest.raises(DataError, match="neither a run's folder nor a file"):
        read_comparison(str(tmp_path / "nothing"), run)
