"""A function of yours as judge."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from prefloop.errors import JudgeError, failure
from prefloop.judges import EMPTY, Judge, NoVerdict, OpenJudge, Verdict, finite
from prefloop.records import Prompt

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial

Function = Callable[[Prompt, list[str]], Sequence[float] | None]

DECLINED = NoVerdict("the function gave no verdict")


class Python(Judge):
    """A function of yours: f(prompt, responses) gives one score a response, or None for no verdict."""

    function: str = Field(pattern=r"^\w+(\.\w+)*:\w+(\.\w+)*$")
    """module:function, found as Python finds modules from the working directory; called once a group."""

    def check(self) -> None:
        """Import the function."""
        self.import_function()

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Import the function. Raises JudgeError."""
        return _OpenPython(self.function, self.import_function())

    def import_function(self) -> Function:
        """The function; JudgeError where it cannot be imported."""
        module, _, path = self.function.partition(":")
        try:
            target: object = importlib.import_module(module)
            for name in path.split("."):
                target = getattr(target, name)
        except (Exception, SystemExit) as error:  # whatever the module does while it is imported
            raise JudgeError(
                f"judge.function {self.function!r} cannot be imported ({failure(error)}); mend it, or "
                "name it as module:function, from the working directory or an installed package"
            ) from error
        if not callable(target):
            raise JudgeError(f"judge.function {self.function!r} is no function; name one")
        return target


@dataclass(frozen=True)
class _OpenPython:
    name: str
    function: Function

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        return [self._group(p, group) for p, group in zip(prompts, groups, strict=True)]

    def _group(self, prompt: Prompt, group: Sequence[str]) -> Verdict:
        if not all(text.strip() for text in group):
            return EMPTY
        try:
            scores = self.function(prompt, list(group))
        except Exception as error:
            raise JudgeError(
                f"judge.function {self.name!r} failed on prompt {prompt.id!r} ({failure(error)}); mend it, "
                "then the same command goes on"
            ) from error
        if scores is None:
            return DECLINED
        try:
            numbers = [float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise JudgeError(
                f"judge.function {self.name!r} gave {scores!r} for prompt {prompt.id!r}; "
                "it must give one number a response, or None"
            ) from error
        if len(numbers) != len(group):
            raise JudgeError(
                f"judge.function {self.name!r} gave {len(numbers)} scores for {len(group)} responses "
                f"to prompt {prompt.id!r}; it must give one number a response, or None"
            )
        return finite(numbers)
