"""Prompts on disk behave as a list of them would."""

import os
from pathlib import Path

from prefloop.data.prompt_store import PromptStore
from prefloop.records import Message, Prompt

PROMPTS = [
    Prompt(id=str(n), messages=(Message(role="user", content=f"Zeile\u2028{n}\n"),), target="é" * n)
    for n in range(5)
]


def test_prompts_come_back_as_they_went_in_by_place_by_slice_and_in_order(tmp_path):
    spool = PromptStore(PROMPTS, tmp_path)
    assert list(spool) == PROMPTS
    assert (spool[2], spool[-1], len(spool)) == (PROMPTS[2], PROMPTS[4], 5)
    assert list(spool[1:4]) == PROMPTS[1:4]
    assert list(spool.picked([3, 0, 3])) == [PROMPTS[3], PROMPTS[0], PROMPTS[3]]
    assert list(spool.picked([3, 0])[1:]) == [PROMPTS[0]]


def test_the_file_has_no_name_and_goes_with_the_last_view(tmp_path):
    def descriptors() -> int:
        return len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))

    before = descriptors()
    view = PromptStore(PROMPTS, tmp_path)[1:]
    assert list(tmp_path.iterdir()) == []
    assert view[0] == PROMPTS[1]
    assert descriptors() == before + 1
    del view
    assert descriptors() == before
