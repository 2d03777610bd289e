"""Examples on disk behave as a list of them would."""

import subprocess
import sys

from prefloop.train.batches import Example
from prefloop.train.example_store import ExampleStore
from prefloop.train.packing import TokenGroup

EXAMPLES = [
    Example(f"0000/é{n}", TokenGroup((1, 2, 70_000), ((n,), (), (n, 5))), n / 3, -1.5, 0.1)
    for n in range(4)
]


def test_examples_come_back_as_they_went_in_by_place_by_slice_and_in_order(tmp_path):
    store = ExampleStore(iter(EXAMPLES), tmp_path)
    assert list(store) == EXAMPLES
    assert (store[2], store[-1], len(store)) == (EXAMPLES[2], EXAMPLES[3], 4)
    assert store[1:3] == EXAMPLES[1:3]
    assert store[0].group.longest == EXAMPLES[0].group.longest
    assert [example.tokens for example in store] == [example.tokens for example in EXAMPLES]
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_with_rows_open_says_nothing():
    code = "from prefloop.data.row_file import RowFile; kept = RowFile([b'a']); kept.itself = kept"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
