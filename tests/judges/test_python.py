import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from prefloop.errors import JudgeError
from prefloop.generate.templates import PromptSet
from prefloop.judges import NoVerdict, Verdict
from prefloop.judges.python import Python
from prefloop.records import Message, Prompt

PROMPT = Prompt(id="p7", messages=(Message(role="user", content="Where?"),), target="north")


def lengths(prompt: Prompt, responses: list[str]) -> list[int]:
    return [len(text) for text in responses]


def example(folder: Path) -> dict[str, Any]:
    return {"function": f"{__name__}:lengths"}


def equals_target(prompt: Prompt, responses: list[str]) -> list[bool]:
    return [text == prompt.target for text in responses]


class Holder:
    @staticmethod
    def nothing(prompt: Prompt, responses: list[str]) -> None:
        return None


def too_few(prompt: Prompt, responses: list[str]) -> list[float]:
    return [1.0]


def words(prompt: Prompt, responses: list[str]) -> list[str]:
    return ["good", "bad"]


def no_number(prompt: Prompt, responses: list[str]) -> list[float]:
    return [float("nan"), 1.0]


NO_FUNCTION = 3


def score(function: str, group: Sequence[str] = ("north", "it")) -> Verdict:
    judge = Python(function=f"{__name__}:{function}").open(None, PromptSet("compact"))
    return judge.score([PROMPT], [group])[0]


def test_the_function_gives_the_scores() -> None:
    assert score("lengths") == (5.0, 2.0)
    assert score("equals_target") == (1.0, 0.0)


def test_none_is_no_verdict_and_so_is_a_score_that_is_no_number() -> None:
    assert score("Holder.nothing") == NoVerdict("the function gave no verdict")
    assert score("no_number") == NoVerdict("score is not finite")
    assert score("lengths", ("north", " ")) == NoVerdict("empty response")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("too_few", "gave 1 scores for 2 responses to prompt 'p7'"),
        ("words", "gave ['good', 'bad'] for prompt 'p7'"),
        ("NO_FUNCTION", "is no function"),
        ("gone", "cannot be imported"),
    ],
)
def test_a_function_that_cannot_judge_is_an_error(function: str, says: str) -> None:
    with pytest.raises(JudgeError, match=re.escape(says)):
        score(function)


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(JudgeError, match="no_such_module"):
        Python(function="no_such_module:f").open(None, PromptSet("compact"))


def test_a_name_without_a_module_is_refused() -> None:
    with pytest.raises(ValidationError, match="function"):
        Python(function="lengths")
