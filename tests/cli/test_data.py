"""`prefloop data`: what it prints is what a run would read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from prefloop import cli
from tests import shapes

ROWS = [
    {"ask": "Name a colour.", "chosen": "Blue.", "rejected": "Seven.", "score": 1},
    {"ask": "Name a colour.", "chosen": "Blue.", "rejected": "Seven.", "score": 2},
    {"ask": "Sing " + "la " * 600, "chosen": "La.", "rejected": "La."},
]


@pytest.fixture
def said(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Runs the command on ROWS and gives its output."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(*words: str) -> str:
        command = ["prefloop", "data", str(source), "--model", str(model_folder), *words]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return f"{end.value.code or 0} {out}{err}"

    return run


def test_it_shows_format_uses_lengths_duplicates_and_what_is_trained_on(said) -> None:
    text = said("--set", "data.prompt_field=ask", "-n", "1")
    assert text.startswith("0 ")
    assert "3 rows read as pairs from chosen, rejected, ask; ignored: score" in text
    assert "pairs            2   without: 1 identical answers" in text
    assert "1   conversations that came before, 1 of them with the same answers" in text
    assert "1 over data.max_prompt_tokens (512)" in text
    assert "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n" in text
    assert "chosen «Blue.<|im_end|>»\nrejected «Seven.<|im_end|>»" in text
    assert text.count("\n--- ") == 1


def test_the_template_is_told_what_a_recipe_tells_it(said, tmp_path: Path) -> None:
    shapes.qwen3().save_pretrained(tmp_path / "model")
    told = ["--model", str(tmp_path / "model"), "--set", "prompt_field=ask"]
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n\nchosen «Blue.<|im_end|>»"
    assert closed not in said(*told)
    assert closed in said(*told, "--set", "model.chat_template_kwargs.enable_thinking=false")
    text = said(*told, "--set", "model.chat_template_kwargs.thinks=false")
    assert text.startswith("2 ")
    assert "model.chat_template_kwargs.thinks: the chat template of" in text


def test_it_gives_the_same_as_json(said) -> None:
    found = json.loads(said("--set", "prompt_field=ask", "--json").removeprefix("0 "))
    assert found["uses"]["pairs"] == {"usable": 2, "without": {"identical answers": 1}}
    assert found["uses"]["targets"]["usable"] == 3
    assert (found["equal_prompts"], found["equal_rows"]) == (1, 1)
    assert len(found["first"]) == 3


def test_what_cannot_be_read_is_one_sentence(said) -> None:
    text = said()
    assert text.startswith("2 prefloop: ")
    assert "rows.jsonl:1 has neither 'prompt' nor 'messages'" in text
    assert text.count("\n") == 1


def test_an_unknown_option_is_named(said) -> None:
    assert "promt_field" in said("--set", "promt_field=ask")
