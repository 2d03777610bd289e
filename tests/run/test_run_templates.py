"""Chat templates in a run: its first day is told on every day, arguments reach the policy's prompts, remarks come once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from prefloop.manifest import read_sealed, sealed
from prefloop.models.chat_template import set_template_date
from prefloop.recipe import Recipe
from prefloop.records import Message
from prefloop.run.session import Session
from prefloop.run_folder import open_run
from tests import shapes
from tests.conftest import tiny_llama

ASKED = (Message(role="user", content="Where?"),)


@pytest.fixture(autouse=True)
def _no_fixed_date() -> Iterator[None]:
    yield
    set_template_date(None)


def recipe(tokenizer: Any, folder: Path, **options: Any) -> Recipe:
    """One whose model, made in `folder`, has this tokenizer."""
    model = tiny_llama(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = {"source": str(folder), "device": "cpu", "dtype": "float32", **options}
    return Recipe.model_validate({"name": "r", "model": source, "method": {"name": "arop"}})


def prompt_of(session: Session) -> str:
    chat = session.engine_at(None).chat
    return str(chat.tokenizer.decode(chat.prompt_ids(ASKED)))


def test_a_run_that_goes_on_another_day_tells_the_day_it_began(tmp_path: Path) -> None:
    chosen, folder = recipe(shapes.dated(), tmp_path / "model"), tmp_path / "run"
    with open_run(folder, chosen.dump()) as rundir:
        assert rundir.first_day() == date.today()
        assert f"Today: {date.today():%d %b %Y}" in prompt_of(Session(chosen, rundir))
    around = folder / "environment.json"
    noted = read_sealed(around, "")
    around.write_text(sealed({**noted, "date": "2025-03-01"}))
    with open_run(folder, chosen.dump()) as rundir:
        assert "Today: 01 Mar 2025" in prompt_of(Session(chosen, rundir))
    assert json.loads(around.read_text())["date"] == "2025-03-01"


def test_the_recipe_s_arguments_reach_the_policy_s_prompts(tmp_path: Path) -> None:
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    chosen = recipe(shapes.qwen3(), tmp_path / "model", **options)
    with open_run(tmp_path / "run", chosen.dump()) as rundir:
        assert prompt_of(Session(chosen, rundir)).endswith("<think>\n\n</think>\n\n")


def test_what_differs_from_the_template_stands_once_in_the_diary(tmp_path: Path) -> None:
    chosen = recipe(shapes.glm4(), tmp_path / "model")
    for _ in range(2):
        with open_run(tmp_path / "run", chosen.dump()) as rundir:
            Session(chosen, rundir).engine_at(None)
    told = [event["sentence"] for event in rundir.events() if event["event"] == "template"]
    assert len(told) == 1
    assert "ends an answer with no token, so <|user|> ends it" in told[0]
