"""The base class of judges, which score responses. One file per judge; its name is the judge's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from prefloop.config import Options
from prefloop.machine import Bar
from prefloop.records import Prompt, Response

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet

    Initial = Callable[[], AbstractContextManager[Engine]]
    """A context in which the engine computes with the initial policy."""


@dataclass(frozen=True)
class NoVerdict:
    """A judge's failure on a group; it is counted and the group rejected, never turned into a score."""

    reason: str
    """A short fixed phrase, by which failures are counted."""


Verdict = tuple[float, ...] | NoVerdict
"""One score per response of a group, higher is better; or no verdict on the whole group."""

EMPTY = NoVerdict("empty response")
ALONE = NoVerdict("nothing to compare with")
NO_TARGET = NoVerdict("no target")
NOT_FINITE = NoVerdict("score is not finite")


def finite(scores: Sequence[float]) -> Verdict:
    """The scores as a verdict; NOT_FINITE where one of them is NaN or infinite."""
    return tuple(map(float, scores)) if all(map(math.isfinite, scores)) else NOT_FINITE


class OpenJudge(Protocol):
    """An opened judge."""

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        """Score each group of responses to its prompt; one verdict per group, in order.

        A verdict depends only on the prompt's messages and target and on the group.
        """
        ...


@runtime_checkable
class TokenJudge(OpenJudge, Protocol):
    """A judge at work that asks the policy how likely its answers are: it sees the tokens that were sampled."""

    def score_sampled(
        self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Response]]
    ) -> list[Verdict]:
        """As `score`, of responses with their tokens."""
        ...


def score_responses(
    judge: OpenJudge, prompts: Sequence[Prompt], groups: Sequence[Sequence[Response]]
) -> list[Verdict]:
    """Verdicts on responses: on their tokens where the judge looks at tokens, else on their texts."""
    if isinstance(judge, TokenJudge):
        return judge.score_sampled(prompts, groups)
    return judge.score(prompts, [tuple(response.text for response in g) for g in groups])


class Judge(Options):
    """A judge: its fields are its options; `open` loads it."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Options for its checks, where an option is required; judges that load or ask something say it in their tests."""

    @property
    def needs_target(self) -> bool:
        """Whether every prompt must have a target response."""
        return False

    @property
    def needs_policy(self) -> bool:
        """Whether the judge uses the policy, so that its verdicts change with the policy."""
        return False

    @property
    def needs_moved_policy(self) -> bool:
        """Whether it has no verdict while the policy equals the initial one, as in round 0."""
        return False

    @property
    def sources(self) -> dict[str, str]:
        """Option -> folder or Hub id that `open` loads."""
        return {}

    def check(self) -> None:
        """Raise a PrefloopError for anything that would stop `open` and shows without loading a model."""

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Load what the judge needs.

        `policy` is the current policy's engine, `initial` the initial policy's; both are None where no
        policy is loaded. Raises JudgeError.
        """
        raise NotImplementedError


class CachedJudge:
    """A judge with a cache of its verdicts; it judges in batches, under a progress bar."""

    BATCH_SIZE = 64
    """Groups judged at a time."""
    CACHE_SIZE = 20_000
    """Number of cached verdicts, the latest ones; it bounds memory."""

    def __init__(self, judge: OpenJudge) -> None:
        self._judge = judge
        self._cache: dict[bytes, Verdict] = {}

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        """The judge's verdicts on texts; see `score_sampled`."""
        return self.score_sampled(prompts, [[Response(text=text) for text in g] for g in groups])

    def score_sampled(
        self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Response]]
    ) -> list[Verdict]:
        """The judge's verdicts; groups that are in the cache, or repeated, are not judged again."""
        by_tokens = isinstance(self._judge, TokenJudge)
        keys = [
            _cache_key(prompt, group, by_tokens)
            for prompt, group in zip(prompts, groups, strict=True)
        ]
        new = {
            key: index for index, key in reversed(list(enumerate(keys))) if key not in self._cache
        }
        indices = iter(sorted(new.values()))
        verdict_of = {key: self._cache[key] for key in keys if key in self._cache}
        # A single batch is left to the bar of whoever does the work.
        with Bar("judge", len(new)) if len(new) > self.BATCH_SIZE else nullcontext() as bar:
            while batch := list(islice(indices, self.BATCH_SIZE)):
                verdicts = score_responses(
                    self._judge, [prompts[i] for i in batch], [groups[i] for i in batch]
                )
                verdict_of |= {keys[i]: verdict for i, verdict in zip(batch, verdicts, strict=True)}
                if bar is not None:
                    bar.advance(items=len(batch))
        self._cache |= verdict_of
        for key in list(self._cache)[: max(0, len(self._cache) - self.CACHE_SIZE)]:
            del self._cache[key]
        return [verdict_of[key] for key in keys]


def _cache_key(prompt: Prompt, group: Sequence[Response], by_tokens: bool) -> bytes:
    """A hash of all that a verdict depends on; of the tokens only where the judge looks at them."""
    parts = [text for m in prompt.messages for text in (m.role, m.content)]
    parts += [repr(prompt.target), str(len(group)), *(response.text for response in group)]
    if by_tokens:
        parts += [f"{response.finish} {response.token_ids}" for response in group]
    digest = sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()
