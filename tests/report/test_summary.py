"""The end of a run and the look back: which pairs are shown, in which order, and what is said."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from prefloop.errors import RunFolderError
from prefloop.records import Message, Pair, Reject, RoundResult, write_jsonl
from prefloop.report.console import glance
from prefloop.report.summary import show_outcome, show_run
from prefloop.run_folder import Outcome, RunDir, open_run


def pair(name: str, number: int, chosen: str = "a better answer") -> Pair:
    return Pair(
        prompt_id=name,
        round=number,
        prompt=(Message(role="user", content=f"Question {name}?"),),
        chosen=chosen,
        rejected="a worse answer",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two rounds of four pairs each; the start and the first round are measured."""
    path = tmp_path / "run"
    with open_run(path, "name: run\n") as run:
        for number in range(2):
            round_dir = run.round(number)
            pairs = [pair(f"p{n}", number) for n in range(4)]
            write_jsonl(round_dir.path / "pairs.jsonl", pairs)
            round_dir.finish("pairs")
        for number, score in ((-1, 1.25), (0, 2.5)):
            round_dir = run.round(number)
            measures = {"score": score, "win_rate": 0.5, "train_secret": 0.125}
            result = RoundResult(round=number, measures=measures)
            write_jsonl(round_dir.path / "result.jsonl", [result])
            round_dir.finish("result")
    return path


def shown(folder: Path, name: str | None = None, count: int = 3) -> str:
    console = Console(file=io.StringIO(), width=80)
    show_run(folder, console, pair=name, count=count)
    return console.file.getvalue()  # type: ignore[attr-defined]


def ids(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines() if line.startswith("pair ")]


def test_the_newest_pairs_come_first_and_as_many_as_asked(folder: Path) -> None:
    assert ids(shown(folder)) == ["0001/p3", "0001/p2", "0001/p1"]
    assert ids(shown(folder, count=5))[3:] == ["0001/p0", "0000/p3"]
    assert ids(shown(folder, count=0)) == []
    assert len(ids(shown(folder, count=100))) == 8


def test_a_pair_of_equal_answers_is_not_shown_unless_it_is_asked_for(folder: Path) -> None:
    """IAL may train on a rewrite that repeats the draft; nobody learns anything from seeing it."""
    run = RunDir(folder)
    pairs = [pair("p0", 1), pair("p1", 1, chosen="a  worse answer ")]
    write_jsonl(run.round(1).path / "pairs.jsonl", pairs)
    run.round(1).finish("pairs")
    assert ids(shown(folder, count=2)) == ["0001/p0", "0000/p3"]
    assert ids(shown(folder, "0001/p1")) == ["0001/p1"]
    console = Console(file=io.StringIO(), width=80)
    show_outcome(Outcome(folder, folder / "policy", run.results()), console)
    assert ids(console.file.getvalue()) == ["0001/p0"]  # type: ignore[attr-defined]


def test_export_is_offered_where_it_would_write_something(folder: Path) -> None:
    run = RunDir(folder)

    def offered() -> bool:
        console = Console(file=io.StringIO(), width=80)
        show_outcome(Outcome(folder, folder / "policy", run.results()), console)
        return "prefloop export" in console.file.getvalue()  # type: ignore[attr-defined]

    assert offered()
    cut, single = {"unfinished": ("chosen",)}, {"rejected": ""}
    for number, change in ((0, single), (1, cut)):
        write_jsonl(
            run.round(number).path / "pairs.jsonl", [pair("p0", number).model_copy(update=change)]
        )
        run.round(number).finish("pairs")
    assert not offered()


def test_the_win_rates_interval_stands_with_it(folder: Path) -> None:
    ends = {"win_rate_low": 0.375, "win_rate_high": 0.625}
    measures = {"score": 2.5, "win_rate": 0.5, **ends}
    round_dir = RunDir(folder).round(0)
    write_jsonl(round_dir.path / "result.jsonl", [RoundResult(round=0, measures=measures)])
    round_dir.finish("result")
    table = [line.split() for line in shown(folder, count=0).splitlines()]
    assert ["win_rate_low", "-", "0.375"] in table
    assert glance(measures) == "score 2.50, win rate 0.50 (0.38 to 0.62)"
    assert glance({"win_rate": 0.5, "win_rate_low": 0.5, "win_rate_high": 0.5}) == "win rate 0.50"


def test_the_table_has_the_measures_worth_a_glance(folder: Path) -> None:
    text = shown(folder, count=0)
    [row] = [line for line in text.splitlines() if line.startswith("score ")]
    assert "1.25" in row
    assert "2.50" in row
    assert "win_rate" in text
    assert "secret" not in text


def test_a_pair_is_shown_by_its_id_or_in_all_rounds_by_its_prompts(folder: Path) -> None:
    assert ids(shown(folder, "0000/p2")) == ["0000/p2"]
    assert ids(shown(folder, "p2")) == ["0000/p2", "0001/p2"]
    assert "score" not in shown(folder, "p2")


def test_an_unknown_pair_is_answered_with_one_that_exists(folder: Path) -> None:
    with pytest.raises(RunFolderError, match="no pair 'p9'; ids look like '0000/p0'"):
        shown(folder, "p9")


def test_a_run_without_pairs_yet_says_what_ids_look_like(tmp_path: Path) -> None:
    with open_run(tmp_path / "new", "name: new\n"):
        pass
    with pytest.raises(RunFolderError, match="'0000/prompt-id'"):
        shown(tmp_path / "new", "p0")
    assert ids(shown(tmp_path / "new")) == []


def test_a_round_whose_prompts_gave_no_pair_says_why(folder: Path) -> None:
    assert "no pairs" not in shown(folder)
    with open_run(folder, "name: run\n") as run:
        round_dir = run.round(2)
        reasons = ["cut off", "empty answer", "cut off"]
        rejects = [Reject(prompt_id="p", stage="pair", reason=reason) for reason in reasons]
        write_jsonl(round_dir.path / "rejects.jsonl", rejects)
        write_jsonl(round_dir.path / "pairs.jsonl", [])
        round_dir.finish("pairs")
    said = "round 2 made no pairs (2 cut off, 1 empty answer)"
    assert f"{said}; {round_dir.path}/rejects.jsonl says more" in shown(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no recipe\.yaml"):
        shown(tmp_path)


def test_the_end_shows_the_last_rounds_first_pairs_and_what_to_do_next(folder: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    results = [RoundResult(round=-1, measures={"score": 1.25})]
    show_outcome(Outcome(folder, folder / "policy", results), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ids(text) == ["0001/p0", "0001/p1", "0001/p2"]
    assert f"policy   {folder}/policy\n" in text, "paths are not wrapped, whatever the width"
    assert f"prefloop show {folder} -n 10" in text
    assert f"prefloop export {folder} pairs.jsonl" in text
