"""Rows of every format with cells exchanged at random: a sentence, or entries that are whole; never a traceback."""

from __future__ import annotations

import json
from random import Random

from prefloop.data.cells import RowContent
from prefloop.data.formats import FORMATS, FieldOptions, read_row
from prefloop.errors import DataError
from tests.data.test_formats import SHAPES

TURN = {"role": "user", "content": "q"}
CELLS: list[object] = [
    *(None, 5, 1.5, True, "", "x", [], {}, ["a"], [1], [None], [{}], {"a": 1}, float("nan")),
    *([TURN], [TURN, TURN], [[TURN]], json.dumps([TURN]), "[{", [5, "a"], [["a"]], [["a", "b"]]),
    *("\n\nHuman: a\n\nAssistant: b", "### Human: x", [{"role": "assistant", "content": "z"}]),
    *({"messages": []}, {"messages": "x", "tools": 1}, [{"from": 5, "value": "x"}]),
    *([{"answer": "x", "rank": None}], [{"response": 1, "overall_score": "x"}]),
    *([{"role": ["a"], "content": "b"}], [{**TURN, "content": [{"type": "text", "text": 5}]}]),
]
NAMES = sorted({name for shape in SHAPES.values() for row in shape.rows for name in row})


def outcome(row: dict[str, object], options: FieldOptions) -> RowContent | DataError:
    """What is read of a row, or the sentence that refuses it."""
    try:
        return read_row("rows.jsonl:1", row, options).content
    except DataError as error:
        return error


def test_no_row_is_a_traceback_and_what_is_read_is_whole() -> None:
    rng = Random(0)
    read = refused = 0
    for _ in range(6000):
        row = json.loads(json.dumps(rng.choice(list(SHAPES.values())).rows[0]))
        for _ in range(rng.randint(1, 3)):
            row[rng.choice(NAMES if rng.random() < 0.5 else list(row))] = rng.choice(CELLS)
        format = rng.choice(FORMATS).name if rng.random() < 0.2 else None
        found = outcome(row, FieldOptions(format=format))
        if isinstance(found, DataError):
            assert str(found).startswith("rows.jsonl:1")
            assert "\n" not in str(found)
            refused += 1
            continue
        read += 1
        for entry in found if not isinstance(found, str) else ():
            assert entry.messages[-1].role == "user"
            assert all(turn.content.strip() for turn in entry.messages)
            assert entry.flaw or (entry.chosen is None) == (entry.rejected is None)
            assert entry.target is None or entry.target.strip()
    assert read > 500
    assert refused > 500
