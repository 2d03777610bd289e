"""The flat example runs, learns, and computes what the library computes."""

import ast
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from prefloop.models.chat import Chat
from prefloop.records import Message
from prefloop.train import losses
from prefloop.train.logprobs import padded_logprobs
from prefloop.train.packing import TokenGroup

PATH = Path(__file__).parents[1] / "examples" / "flat_loop.py"


@pytest.fixture(scope="module")
def flat() -> dict[str, Any]:
    return runpy.run_path(str(PATH))


def test_it_stays_flat() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    nodes = list(ast.walk(ast.parse(text)))
    modules = [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    assert not any(str(module).startswith("prefloop") for module in modules)
    assert not any(isinstance(node, ast.ClassDef) for node in nodes)


# peft reads a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_two_rounds_run_and_the_second_epoch_is_below_the_first(
    flat: dict[str, Any], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every round measures from its own start, so its first epoch begins near 2 log 2."""
    data = flat["DATA"][:3]
    found = flat["main"](str(model_folder), data, max_new_tokens=4)
    first, second, third, fourth = found
    assert second < first < 2 * math.log(2) + 0.01
    assert fourth < third < 2 * math.log(2) + 0.01
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("round ") for line in lines) == 2 * (len(data) + 2)


def test_its_loss_is_the_librarys(flat: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    target, better, worse = 30 * torch.randn(3, 20, generator=generator)
    expected = losses.spacp(target, better, worse, eta=0.1, gamma=5.0, lam=1.0)
    torch.testing.assert_close(flat["spacp"](target, better, worse), expected)


def test_its_log_probs_are_the_librarys(flat: dict[str, Any], model: Any, tokenizer: Any) -> None:
    chat = Chat(tokenizer)
    asked = (Message(role="user", content="Why?"),)
    completion = tuple(chat.completion_ids(asked, "So."))
    group = TokenGroup(prompt=tuple(chat.prompt_ids(asked)), completions=(completion,))
    expected = padded_logprobs(model, [group])[0][0].sum()
    torch.testing.assert_close(flat["log_prob"](model, tokenizer, "Why?", "So."), expected)
