"""Scores for responses: one file per judge, found by file name; a new file needs no list edited."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from prefloop.config import Options
from prefloop.machine import Bar
from prefloop.records import Prompt

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet

    Initial = Callable[[], AbstractContextManager[Engine]]
    """Inside, the engine answers as the initial policy."""


@dataclass(frozen=True)
class NoVerdict:
    """A judge that could not decide; counted and rejected, never turned into a score."""

    reason: str
    """A short fixed phrase, so that failures can be counted by it."""


Verdict = tuple[float, ...] | NoVerdict
"""One score per response of a group, higher is better; or no verdict on the whole group."""

EMPTY = NoVerdict("empty response")
ALONE = NoVerdict("nothing to compare with")
NOT_FINITE = NoVerdict("score is not finite")


def finite(scores: Sequence[float]) -> Verdict:
    """The scores as a verdict, unless one of them is no number."""
    return tuple(map(float, scores)) if all(map(math.isfinite, scores)) else NOT_FINITE


class OpenJudge(Protocol):
    """A judge at work."""

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        """Score each group of responses to its prompt; one verdict a group, in order.

        A verdict depends on the prompt's messages and target and on the group, on nothing else.
        """
        ...


class Judge(Options):
    """A judge is a frozen model: its fields are its options; `open` puts it to work."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Options for its checks, where an option is required; judges that load or ask something say it in their tests."""

    @property
    def needs_target(self) -> bool:
        """Whether every prompt must come with a target response."""
        return False

    @property
    def needs_policy(self) -> bool:
        """Whether the judge is (or asks) the policy itself: its verdicts then change with the policy."""
        return False

    @property
    def needs_moved_policy(self) -> bool:
        """Whether it has no verdict as long as the policy is the initial one, as in round 0."""
        return False

    @property
    def sources(self) -> dict[str, str]:
        """Folders or Hub ids that `open` loads, by option."""
        return {}

    def check(self) -> None:
        """Raise a PrefloopError for what would stop `open` and can be told without loading or asking."""

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Load what the judge needs.

        `policy` is the current policy's engine, `initial` the initial policy's; both are None where no
        policy is loaded. Raises JudgeError.
        """
        raise NotImplementedError


class CachedJudge:
    """A judge that is asked about the same prompt and group once, in batches, under a progress bar."""

    BATCH = 64
    """Groups put to the judge at a time."""
    KEPT = 20_000
    """Verdicts remembered, the latest ones; so that a run's memory does not grow with its data."""

    def __init__(self, judge: OpenJudge) -> None:
        self._judge = judge
        self._known: dict[bytes, Verdict] = {}

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        """As the judge at work would, without its doing anything twice."""
        keys = [_content(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
        new = {
            key: place for place, key in reversed(list(enumerate(keys))) if key not in self._known
        }
        places = iter(sorted(new.values()))
        found = {key: self._known[key] for key in keys if key in self._known}
        # A single batch is left to the bar of whoever does the work.
        with Bar("judge", len(new)) if len(new) > self.BATCH else nullcontext() as bar:
            while batch := list(islice(places, self.BATCH)):
                verdicts = self._judge.score(
                    [prompts[p] for p in batch], [groups[p] for p in batch]
                )
                found |= {keys[p]: verdict for p, verdict in zip(batch, verdicts, strict=True)}
                if bar is not None:
                    bar.advance(items=len(batch))
        self._known |= found
        for key in list(self._known)[: max(0, len(self._known) - self.KEPT)]:
            del self._known[key]
        return [found[key] for key in keys]


def _content(prompt: Prompt, group: Sequence[str]) -> bytes:
    parts = [text for m in prompt.messages for text in (m.role, m.content)]
    parts += [repr(prompt.target), str(len(group)), *group]
    digest = sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()
