"""Scores for responses: one file per judge, found by file name; a new file needs no list edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from prefloop.records import Prompt

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet


@dataclass(frozen=True)
class NoVerdict:
    """A judge that could not decide; counted and rejected, never turned into a score."""

    reason: str


Verdict = tuple[float, ...] | NoVerdict
"""One score per response of a group, higher is better; or no verdict on the whole group."""


class OpenJudge(Protocol):
    """A judge at work."""

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        """Score each group of responses to its prompt; one verdict a group, in order."""
        ...


class Judge(BaseModel):
    """A judge is a frozen model: its fields are its options; `open` puts it to work."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    needs_target: ClassVar[bool] = False
    """Whether every prompt must come with a target response."""
    needs_policy: ClassVar[bool] = False
    """Whether the judge is (or asks) the policy itself."""

    def open(self, policy: Engine | None, prompts: PromptSet) -> OpenJudge:
        """Load what the judge needs; `policy` is the current policy's engine."""
        raise NotImplementedError
