"""Subjects and files for tests of measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefloop.evaluate.measures import Subject
from prefloop.generate.engines.fake import FakeEngine
from prefloop.judges import NoVerdict, OpenJudge, Verdict
from prefloop.records import Prompt, Request


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def subject(
    folder: Path,
    answer: Callable[[Request, int], str] | None = None,
    judge: OpenJudge | None = None,
) -> Subject:
    folder.mkdir(exist_ok=True)
    return Subject(
        name="fake",
        engine=FakeEngine(answer),
        initial=None,
        model=None,
        tokenizer=None,
        judge=judge,
        folder=folder,
        seed=0,
    )


@dataclass
class ListJudge:
    """Scores an answer by a function of prompt and answer; remembers what it was shown."""

    rate: Callable[[Prompt, str], float | NoVerdict]
    seen: list[tuple[Prompt, str]] = field(default_factory=list)

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        self.seen += [(p, group[0]) for p, group in zip(prompts, groups, strict=True)]
        found = [self.rate(p, group[0]) for p, group in zip(prompts, groups, strict=True)]
        return [score if isinstance(score, NoVerdict) else (score,) for score in found]


@dataclass
class KilledAt:
    """A function that is interrupted at one of its calls, and works before and after."""

    call: int
    function: Callable[..., Any]
    calls: int = 0

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        if self.calls == self.call:
            raise KeyboardInterrupt
        return self.function(*given)
