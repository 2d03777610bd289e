"""The run's folder: whole chunks only, stages done once, one process and one recipe at a time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import RunFolderError
from prefloop.manifest import write_atomically
from prefloop.records import Candidates, Message, Pair, Prompt, Reject, Response, RoundResult
from prefloop.run.chunks import Journal
from prefloop.run_folder import RoundDir, RunDir, differences, open_run, read_run, replace_folder

RECIPE = "name: a\ntrain:\n  lr: 1.0e-06\n  epochs: 2\n"
OTHER = RECIPE.replace("1.0e-06", "1.0e-05")
OTHER = RECIPE.replace("1.0e-06", "1.0e-05")


def pair(number: int) -> Pair:
    question = (Message(role="user", content="Größe?\u2028"),)
    return Pair(prompt_id=f"p{number}", round=0, prompt=question, chosen="a", rejected="b")


def reject(number: int, stage: str = "pair") -> Reject:
    return Reject(prompt_id=f"r{number}", stage=stage, reason="identical")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Journal.


def test_records_and_rejects_go_to_their_files_in_order(tmp_path):
    journal = Journal(tmp_path, "pairs")
    journal.append([pair(0), reject(0), pair(1)])
    journal.append([reject(1)])
    round_dir = RoundDir(tmp_path, 0)
    assert round_dir.records("pairs", Pair) == [pair(0), pair(1)]
    assert list(round_dir.rejects()) == [reject(0), reject(1)]
    assert journal.chunks == 2


@pytest.mark.parametrize("torn", [b'{"prompt_id": "p9", "rou', b'{"whole": 1}\n', b"\xc3"])
def test_a_torn_write_is_cut_back_to_the_last_whole_chunk(tmp_path, torn):
    journal = Journal(tmp_path, "pairs")
    journal.append([pair(0), reject(0)])
    whole = content(tmp_path)
    for name in ("pairs.jsonl", "rejects.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(torn)
    again = Journal(tmp_path, "pairs")
    assert content(tmp_path) == whole
    assert again.chunks == 1
    again.append([pair(1)])
    assert RoundDir(tmp_path, 0).records("pairs", Pair) == [pair(0), pair(1)]


def test_a_reject_that_is_still_being_written_is_left_out(tmp_path):
    """A report reads beside a run, or after a kill."""
    Journal(tmp_path, "pairs").append([reject(0)])
    with (tmp_path / "rejects.jsonl").open("ab") as file:
        file.write(b'{"prompt_id": "p9", "rou')
    assert list(RoundDir(tmp_path, 0).rejects()) == [reject(0)]


def test_a_diary_with_damaged_lines_is_read_around_them(tmp_path):
    run = RunDir(tmp_path)
    run.event("begin")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"half')
    assert [event["event"] for event in run.events()] == ["begin", "damaged"]


def test_a_torn_diary_is_healed_when_the_run_goes_on(tmp_path):
    """Half a line, and the next event glued to it: a finished run could not be shown any more."""
    with open_run(tmp_path / "a", RECIPE) as run:
        run.event("begin")
    diary = tmp_path / "a" / "events.jsonl"
    with diary.open("ab") as file:
        file.write(b'{"time": "2026-')
    with open_run(tmp_path / "a", RECIPE) as run:
        run.event("end")
    lines = [json.loads(line)["event"] for line in diary.read_text().splitlines()]
    assert lines == ["begin", "end"]


def test_a_chunk_whose_note_is_missing_is_written_again(tmp_path, monkeypatch):
    """Killed between the records and the note that vouches for them."""
    journal = Journal(tmp_path, "pairs")
    journal.append([pair(0)])

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prefloop.run.chunks.write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.append([pair(1), reject(1)])
    assert len(RoundDir(tmp_path, 0).records("pairs", Pair)) == 2
    again = Journal(tmp_path, "pairs")
    assert again.chunks == 1
    again.append([pair(1), reject(1)])
    assert RoundDir(tmp_path, 0).records("pairs", Pair) == [pair(0), pair(1)]
    assert list(RoundDir(tmp_path, 0).rejects()) == [reject(1)]


def test_a_stage_keeps_the_rejects_of_the_stages_before_it(tmp_path):
    Journal(tmp_path, "candidates").append([reject(0, "generate")])
    RoundDir(tmp_path, 0).finish("candidates")
    journal = Journal(tmp_path, "pairs")
    journal.append([reject(1)])
    with (tmp_path / "rejects.jsonl").open("a") as file:
        file.write("half a li")
    Journal(tmp_path, "pairs")
    assert list(RoundDir(tmp_path, 0).rejects()) == [reject(0, "generate"), reject(1)]


def test_a_stage_that_never_noted_anything_starts_with_an_empty_file(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("left over\n")
    assert Journal(tmp_path, "pairs").chunks == 0
    assert (tmp_path / "pairs.jsonl").read_bytes() == b""


def test_a_file_shorter_than_its_note_is_refused_with_the_remedy(tmp_path):
    Journal(tmp_path, "pairs").append([pair(0)])
    (tmp_path / "pairs.jsonl").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"pairs\.jsonl is shorter .*verify .* --redo"):
        Journal(tmp_path, "pairs")


# Manifests.


def test_a_stage_is_done_when_its_manifest_is_there(tmp_path):
    round_dir = RoundDir(tmp_path, 0)
    Journal(tmp_path, "pairs").append([pair(0)])
    assert round_dir.manifest("pairs") is None
    round_dir.finish("pairs", records=1, rejects={"identical": 2})
    manifest = round_dir.manifest("pairs")
    assert manifest is not None
    assert (manifest["stage"], manifest["records"]) == ("pairs", 1)
    assert manifest["rejects"] == {"identical": 2}
    assert "torch" in manifest["versions"]
    assert sorted(content(tmp_path)) == ["pairs.done.json", "pairs.jsonl", "rejects.jsonl"]


def test_the_digest_follows_the_records(tmp_path):
    journal = Journal(tmp_path, "pairs")
    journal.append([pair(0)])
    before = RoundDir(tmp_path, 0).digest("pairs")
    assert before == RoundDir(tmp_path, 0).digest("pairs")
    journal.append([pair(1)])
    assert before != RoundDir(tmp_path, 0).digest("pairs")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "pairs.done.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"pairs\.done\.json .*verify .* --redo"):
        RoundDir(tmp_path, 0).manifest("pairs")


def test_a_damaged_record_is_named_by_file_and_line(tmp_path):
    Journal(tmp_path, "pairs").append([pair(0)])
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write('{"prompt_id": 3}\n')
    with pytest.raises(RunFolderError, match=r"pairs\.jsonl:2 is not a Pair"):
        RoundDir(tmp_path, 0).records("pairs", Pair)


# Atomic writes.


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "note.json"
    write_atomically(path, "old")

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new and longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["note.json"]


def test_a_folder_is_replaced_whole(tmp_path):
    for name, text in (("policy", "old"), (".policy", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(text)
    (tmp_path / "policy" / "only the old one has this").touch()
    replace_folder(tmp_path / ".policy", tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert content(tmp_path / "policy") == {"weights": b"new"}


# The run.


def test_a_new_run_holds_its_recipe_and_where_it_ran(tmp_path):
    with open_run(tmp_path / "runs" / "a", RECIPE) as run:
        assert (run.path / "recipe.yaml").read_text() == RECIPE
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["versions"]["prefloop"]
    assert environment["python"].startswith("3.")


def test_the_same_recipe_goes_on(tmp_path):
    for _ in range(2):
        with open_run(tmp_path / "a", RECIPE) as run:
            run.event("begin", number=1)
    lines = (tmp_path / "a" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["begin", "begin"]


def test_another_recipe_is_refused_naming_what_differs(tmp_path):
    with open_run(tmp_path / "a", RECIPE) as run:
        Journal(run.round(0).path, "candidates").append([reject(0)])
    with (
        pytest.raises(RunFolderError, match=r"train\.lr was 1e-06, now 1e-05.*choose another"),
        open_run(tmp_path / "a", OTHER),
    ):
        pass
    assert (tmp_path / "a" / "recipe.yaml").read_text() == RECIPE


def test_a_mended_recipe_takes_the_place_of_one_that_made_nothing(tmp_path):
    with open_run(tmp_path / "a", RECIPE) as run:
        Journal(run.round(-1).path, "answers")
    with open_run(tmp_path / "a", OTHER):
        assert (tmp_path / "a" / "recipe.yaml").read_text() == OTHER
        assert not (tmp_path / "a" / "rounds").exists()


@pytest.mark.parametrize("place", ["recipe.yaml", "environment.json"])
@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_a_run_killed_while_its_folder_is_made_can_go_on(tmp_path, monkeypatch, place, moment):
    original = Path.replace

    def killed(what: Any, *more: Any) -> Any:
        if (tmp_path / "a" / f"{place}.tmp").exists():
            raise KeyboardInterrupt
        return original(what, *more) if more else None

    with monkeypatch.context() as patch:
        patch.setattr(moment, killed)
        with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "a", RECIPE):
            pass
    with open_run(tmp_path / "a", RECIPE):
        assert (tmp_path / "a" / "recipe.yaml").read_text() == RECIPE
        assert (tmp_path / "a" / "environment.json").is_file()


def test_differences_name_new_and_missing_keys():
    old = {"a": {"b": 1, "c": 2}, "gone": 3}
    new = {"a": {"b": 1, "c": [2]}, "new": None}
    assert differences(old, new) == ["a.c was 2, now [2]", "gone was 3, now None"]
    assert differences(old, old) == []


def test_a_strangers_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(RunFolderError, match=r"'thesis\.tex' but no recipe\.yaml"),
        open_run(tmp_path, RECIPE),
    ):
        pass
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunFolderError, match="cannot write to"),
        open_run(tmp_path / "file" / "a", RECIPE),
    ):
        pass


def test_a_second_process_is_refused_and_the_lock_ends_with_the_first(tmp_path):
    """Only the lock is taken over there: a whole second prefloop would take seconds to start."""
    path = tmp_path / "a"
    holder = (
        "import fcntl, sys\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with open_run(path, RECIPE):
        pass
    command = [sys.executable, "-c", holder, str(path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(RunFolderError, match="in use by another process"),
            open_run(path, RECIPE),
        ):
            pass
        other.kill()
        other.wait()
    with open_run(path, RECIPE):
        pass


def test_a_run_locks_its_folder(tmp_path):
    with open_run(tmp_path / "a", RECIPE):  # noqa: SIM117
        with pytest.raises(RunFolderError, match="in use"), open_run(tmp_path / "a", RECIPE):
            pass


def test_reading_takes_no_lock_but_wants_a_run(tmp_path):
    with open_run(tmp_path / "a", RECIPE):
        assert read_run(tmp_path / "a").rounds() == []
    with pytest.raises(RunFolderError, match="is no run"):
        read_run(tmp_path / "b")


def test_rounds_are_found_in_order_and_start_apart(tmp_path):
    run = RunDir(tmp_path)
    for number in (10, -1, 2):
        run.round(number)
    assert [round_dir.number for round_dir in run.rounds()] == [2, 10]
    assert run.round(-1).path.name == "start"


def test_pairs_and_results_come_from_finished_stages_only(tmp_path):
    run = RunDir(tmp_path)
    for number in (0, 1):
        round_dir = run.round(number)
        Journal(round_dir.path, "pairs").append([pair(number)])
        result = RoundResult(round=number, measures={"score": 1.0})
        Journal(round_dir.path, "result").append([result])
    for stage in ("pairs", "result"):
        run.round(0).finish(stage)
    assert [(round_dir.number, list(found)) for round_dir, found in run.pairs()] == [(0, [pair(0)])]
    assert [result.round for result in run.results()] == [0]
    with pytest.raises(RunFolderError, match="no pairs of round 1"):
        run.pairs([0, 1])


def test_floats_survive_the_file(tmp_path):
    """A resumed run reads what an unbroken one reads: bit for bit."""
    prompt = Prompt(id="p", messages=(Message(role="user", content="?"),))
    group = Candidates(
        prompt=prompt,
        responses={"a": Response(text="\ufffd\u2028", mean_logprob=-0.1 - 0.2)},
        scores={"a": 1 / 3},
        ratings={"tiny": 5e-324, "huge": 1.7976931348623157e308},
    )
    Journal(tmp_path, "ranked").append([group])
    assert RoundDir(tmp_path, 0).records("ranked", Candidates) == [group]
