"""Labelled pairs: every shape of row is read, what cannot be used is counted, no prompt is on both sides."""

import json
from pathlib import Path

import pytest

from prefloop.data.preferences import LabelledPairs, Preference, read_preferences, split_by_prompt
from prefloop.errors import DataError
from prefloop.records import Message


def read(folder: Path, *rows: object, name: str = "pairs", **options: str) -> LabelledPairs:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(str(file), **options)


def test_a_prompt_with_chosen_and_rejected_is_a_pair(tmp_path):
    (pair,) = read(tmp_path, {"id": "a", "prompt": "Hi", "chosen": "x", "rejected": "y"}).pairs
    assert (pair.id, pair.source, pair.chosen, pair.rejected, pair.tie) == (
        "a",
        "pairs",
        "x",
        "y",
        False,
    )
    assert pair.messages == (Message(role="user", content="Hi"),)


def test_a_conversation_keeps_its_turns(tmp_path):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    (pair,) = read(tmp_path, {"messages": turns, "chosen": "x", "rejected": "y"}).pairs
    assert [turn.content for turn in pair.messages] == ["a", "b", "c"]


def test_trls_conversational_form_is_read_with_and_without_a_prompt(tmp_path):
    user = {"role": "user", "content": "Hi"}
    x, y = ({"role": "assistant", "content": text} for text in "xy")
    explicit, implicit = read(
        tmp_path,
        {"prompt": [user], "chosen": [x], "rejected": [y]},
        {"chosen": [user, x], "rejected": [user, y]},
    ).pairs
    for pair in (explicit, implicit):
        assert pair.messages == (Message(role="user", content="Hi"),)
        assert (pair.chosen, pair.rejected) == ("x", "y")


@pytest.mark.parametrize(
    ("votes", "chosen", "tie"),
    [([1, 1, 2], "one", False), ([2, 2, 0], "two", False), ([0, 0, 1], "one", True)],
)
def test_the_label_of_most_annotators_counts(votes, chosen, tie, tmp_path):
    row = {"prompt": "Hi", "response_1": "one", "response_2": "two", "annotators": votes}
    (pair,) = read(tmp_path, row).pairs
    assert (pair.chosen, pair.tie) == (chosen, tie)


def test_rows_that_say_nothing_are_counted_by_reason(tmp_path):
    base = {"prompt": "Hi", "response_1": "one", "response_2": "two", "annotators": [1]}
    found = read(
        tmp_path,
        base,
        base | {"annotators": [0, 1, 2]},
        base | {"response_2": " "},
        base | {"response_2": "one"},
    )
    assert len(found.pairs) == 1
    assert found.dropped == {"no majority": 1, "empty answer": 1, "identical answers": 1}


def test_what_was_written_is_read_again_with_its_source_and_ties(tmp_path):
    row = {"prompt": "Hi", "response_1": "a", "response_2": "b", "annotators": [0]}
    first = read(tmp_path, row, name="panda").pairs
    again = read(tmp_path, json.loads(first[0].model_dump_json()), name="held_out").pairs
    assert again == first
    assert again[0].source == "panda"


def test_a_margin_is_read_where_its_column_is_named(tmp_path):
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "by": 0.5}
    assert read(tmp_path, row).pairs[0].margin == 0.0
    assert read(tmp_path, row, margin_field="by").pairs[0].margin == 0.5


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Hi", "answer": "x"}, r"pairs\.jsonl:1 has neither 'chosen' and 'rejected'"),
        ({"chosen": "x", "rejected": "y"}, r"has neither 'prompt' nor 'messages'"),
        ({"prompt": "Hi", "chosen": 1, "rejected": "y"}, r"'chosen' is int, not text"),
        (
            {"prompt": "Hi", "response_1": "x", "response_2": "y", "annotators": [3]},
            r"'annotators' must be",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
                "chosen": "x",
                "rejected": "y",
            },
            r"ends with the assistant's turn",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_place(row, says, tmp_path):
    with pytest.raises(DataError, match=says):
        read(tmp_path, row)


def pairs(count: int) -> list[Preference]:
    return [
        Preference(
            id=str(n),
            source="s",
            messages=(Message(role="user", content=f"question {n // 3}"),),
            chosen="x",
            rejected=f"y{n}",
        )
        for n in range(count)
    ]


def test_no_prompt_is_on_both_sides_and_the_share_is_about_right():
    train, held_out = split_by_prompt(pairs(1500), 0.25, seed=0)
    assert len(train) + len(held_out) == 1500
    assert not {pair.key for pair in train} & {pair.key for pair in held_out}
    assert len(held_out) / 1500 == pytest.approx(0.25, abs=0.05)
    assert split_by_prompt(pairs(1500), 0.25, seed=1)[1] != held_out


def test_more_pairs_move_no_other_pair():
    _, few = split_by_prompt(pairs(300), 0.25, seed=0)
    _, many = split_by_prompt(pairs(1500), 0.25, seed=0)
    assert [pair for pair in many if int(pair.id) < 300] == few
