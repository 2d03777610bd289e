"""Votes on disk: what stands after a kill at any byte, who sees what, and which files are refused."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from prefloop.annotate.items import AnnotationPlan, Comparison, make_plan, read_comparison
from prefloop.annotate.service import AnnotationService
from prefloop.annotate.votes import StoredVotes, VoteFile, read_votes
from prefloop.errors import DataError, RunFolderError


def standing(stored: StoredVotes) -> dict[str, str]:
    return {item: vote.choice for item, vote in stored.ballots.votes("ann").items()}


def play(service: AnnotationService, answers: list[str]) -> None:
    """Ann votes in the order in which she is asked; "undo" takes the last one back."""
    state = service.join("Ann")
    for answer in answers:
        if answer == "undo":
            state = service.undo("Ann", state["undo"])
        else:
            reason = "unclear" if answer == "skip" else None
            state = service.vote("Ann", state["item"]["id"], answer, reason, 1.5)  # type: ignore[arg-type]


def test_a_kill_at_any_byte_loses_no_line_that_was_whole(
    service: AnnotationService, comparison: Comparison, folder: Path
) -> None:
    play(service, ["first", "tie", "undo", "second", "skip"])
    service.close()
    path = folder / "votes.jsonl"
    data = path.read_bytes()
    assert data.count(b"\n") == 7  # head, name, four votes, one undo
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        (folder / "votes.jsonl.done.json").unlink(missing_ok=True)  # it vouched for all
        VoteFile(path, comparison, AnnotationPlan()).close()
        # What lacks its line break only is whole: it was written, if not acknowledged.
        whole = data[: length + 1] if data[length : length + 1] == b"\n" else data[:length]
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept:
            assert path.read_bytes() == kept
        else:  # not even the head: it is begun anew, at another time
            assert path.read_bytes().count(b"\n") == 1
    assert len(kept) == len(data)


def test_a_torn_line_is_reported_and_the_vote_is_asked_again(
    service: AnnotationService, comparison: Comparison, folder: Path
) -> None:
    play(service, ["first", "second"])
    service.close()
    path = folder / "votes.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    (
        folder / "votes.jsonl.done.json"
    ).unlink()  # a kill in the last line leaves one for the lines before
    stored = read_votes(path, comparison)
    assert len(standing(stored)) == 1
    assert stored.torn_bytes > 0
    assert path.read_bytes() == whole[:-20]  # looking changes nothing
    file = VoteFile(path, comparison, AnnotationPlan())
    assert file.torn_bytes == stored.torn_bytes
    again = AnnotationService(comparison, AnnotationPlan(), file)
    assert again.join("Ann")["done"] == 1
    again.close()


def test_damage_before_the_last_line_is_named(service: AnnotationService, folder: Path) -> None:
    play(service, ["first", "second"])
    service.close()
    path = folder / "votes.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-4], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"votes.jsonl:2 is no vote"):
        StoredVotes(path)


def test_the_newest_line_on_an_item_counts(service: AnnotationService, folder: Path) -> None:
    play(service, ["first", "first"])
    item = service.join("Ann")["undo"]
    service.vote("Ann", item, "tie", None, None)
    service.vote("Ann", item, "tie", None, None)  # the page asks again where an answer was lost
    service.undo("Ann", item)
    service.undo("Ann", item)
    service.vote("Ann", item, "tie", None, None)
    stored = StoredVotes(folder / "votes.jsonl")
    assert standing(stored)[item] == "tie"
    lines = Path("votes.jsonl").read_text().splitlines()
    kinds = Counter(json.loads(line)["kind"] for line in lines)
    assert kinds == {"round": 1, "annotator": 1, "vote": 4, "undo": 1}


def test_a_full_disk_leaves_no_half_line(
    service: AnnotationService, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(service, ["first"])
    before = (folder / "votes.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        item = service.join("Ann")["item"]["id"]
        with pytest.raises(OSError, match="No space"):
            service.vote("Ann", item, "first", None, None)
    assert (folder / "votes.jsonl").read_bytes() == before
    assert service.join("Ann")["item"]["id"] == item


def test_every_vote_is_synced_before_it_counts(
    service: AnnotationService, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(Path("votes.jsonl").read_bytes()), real(fd))[1]
    )
    play(service, ["first", "undo"])
    # Each line, and then the note that vouches for it.
    assert [text.count(b"\n") for text in synced] == [2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("lost", ["a vote", "a choice"])
def test_votes_that_are_lost_or_changed_are_noticed(
    service: AnnotationService, folder: Path, lost: str
) -> None:
    play(service, ["first", "second"])
    service.close()
    path = folder / "votes.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    changed = (
        lines[-1].replace('"choice":"a"', '"choice":"b"').replace('"first":"a"', '"first":"b"')
    )
    path.write_text("".join(lines[:-1] + ([changed] if lost == "a choice" else [])))
    with pytest.raises(RunFolderError, match="does not hold the votes as they were given"):
        StoredVotes(path)


def test_votes_on_other_answers_or_under_another_plan_are_refused(
    service: AnnotationService, comparison: Comparison, folder: Path
) -> None:
    path = folder / "votes.jsonl"
    with pytest.raises(RunFolderError, match="in use by another prefloop annotate"):
        VoteFile(path, comparison, AnnotationPlan())
    service.close()
    with pytest.raises(DataError, match="was begun with --seed 0; give the same"):
        VoteFile(path, comparison, AnnotationPlan(seed=1))
    text = Path("a.jsonl").read_text().replace("a3", "a three")
    Path("a.jsonl").write_text(text)
    other = read_comparison("a.jsonl", "b.jsonl")
    with pytest.raises(DataError, match="holds votes on other prompts or answers"):
        read_votes(path, other)


def test_shares_overlap_as_asked_and_cover_every_item_evenly() -> None:
    items = [f"i{n}" for n in range(20)]
    plan = make_plan(0, 10, 4)
    seen = [plan.order(items, f"person {n}", n) for n in range(8)]
    assert all(len(set(order)) == 10 for order in seen)
    assert len(set.intersection(*map(set, seen))) == 4
    votes = Counter(item for order in seen for item in order)
    assert sorted(set(votes.values())) == [3, 8]  # 8 · 6 votes on 16 items, and the shared
    assert seen[0] != sorted(seen[0])
    fifths = [set(make_plan(0, 5, None).order(items, f"person {n}", n)) for n in range(3)]
    assert len(set.intersection(*fifths)) == 1  # where --shared is left out, a fifth of --each
    with pytest.raises(DataError, match="--shared 3 needs --each"):
        make_plan(0, None, 3)


def test_the_order_of_answers_is_drawn_by_item_and_annotator() -> None:
    items = [f"i{n}" for n in range(400)]
    ann, bob = ([AnnotationPlan().first(who, item) for item in items] for who in ("ann", "bob"))
    for one in (ann, bob):
        assert 160 < one.count("a") < 240
    assert 160 < sum(a == b for a, b in zip(ann, bob, strict=True)) < 240
    assert ann == [AnnotationPlan().first("ann", item) for item in items]
    assert ann != [AnnotationPlan(seed=1).first("ann", item) for item in items]
