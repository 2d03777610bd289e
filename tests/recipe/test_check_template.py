"""`prefloop check` renders what the recipe will need, so that a template fails there and not in the first round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import ModelError
from prefloop.recipe import Recipe
from prefloop.recipe.check import check_recipe
from tests import shapes
from tests.conftest import tiny_llama


def recipe(tokenizer: Any, folder: Path, *roles: str, **options: Any) -> Recipe:
    """Three conversations of these roles for a model with this tokenizer."""
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    turns = [{"role": role, "content": f"{role} says"} for role in roles]
    row = {"messages": [*turns, {"role": "assistant", "content": "So."}]}
    rows = folder / "rows.jsonl"
    rows.write_text(f"{json.dumps(row)}\n" * 3)
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"source": str(folder), **options},
            "method": {"name": "ial"},
            "judge": {"name": "similarity"},
            "data": {"train": str(rows), "holdout": 1},
            "loop": {"rounds": 1, "prompts_per_round": 2, "mix_previous": False},
            "train": {"batch_size": 2, "micro_batch_size": 2},
        }
    )


def test_a_template_that_takes_everything_is_not_remarked_on(tmp_path: Path) -> None:
    asked = recipe(shapes.chatml(), tmp_path, "system", "user", "assistant", "user")
    assert not [note for note in check_recipe(asked) if "chat template" in note]


@pytest.mark.parametrize(
    ("tokenizer", "roles", "sentence"),
    [
        (shapes.mistral(), ("system", "user"), "refuses the turns system, user"),
        (
            shapes.chatml(shapes.CHATML.replace("in messages", "in messages[-2:]")),
            ("user", "assistant", "user"),
            "leaves out the user turn of the turns user, assistant, user",
        ),
        (shapes.chatml("{{ messages + 1 }}"), ("user",), "TypeError"),
        (shapes.chatml("{{ who.says }}"), ("user",), "'who' is undefined"),
        (shapes.chatml("Hi."), ("user",), "leaves out what it is given"),
    ],
)
def test_what_the_first_round_would_meet_is_said(
    tokenizer: Any, roles: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="chat template") as caught:
        check_recipe(recipe(tokenizer, tmp_path, *roles))
    assert sentence in str(caught.value)


def test_what_differs_from_the_template_is_a_note(tmp_path: Path) -> None:
    notes = check_recipe(recipe(shapes.no_generation_prompt(), tmp_path, "user"))
    assert [note for note in notes if "it has no generation prompt, so" in note]


def test_an_argument_that_the_template_does_not_know_is_refused(tmp_path: Path) -> None:
    asked = recipe(shapes.qwen3(), tmp_path, "user", chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(
        ModelError, match=r"model\.chat_template_kwargs\.enable_thinkin: .*enable_thinking"
    ):
        check_recipe(asked)
