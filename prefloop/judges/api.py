"""A model behind a server as judge: vLLM, llama.cpp's server, a provider.

Replies cost money or time, so each is appended to a file at once, under a hash of the whole request; a killed
run does not ask again for those in the file.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from prefloop.errors import JudgeError
from prefloop.generate.api_client import (
    Ask,
    ChatServer,
    Refused,
    Reply,
    ServerOptions,
    demand_client,
)
from prefloop.judges import Judge, NoVerdict, OpenJudge, Verdict, finite
from prefloop.judges._verdict_text import read_verdict
from prefloop.judges.self_judge import Question, question
from prefloop.machine import Bar
from prefloop.records import Message, Prompt, Record

if TYPE_CHECKING:
    from prefloop.generate.engine import Engine
    from prefloop.generate.templates import PromptSet
    from prefloop.judges import Initial

logger = logging.getLogger(__name__)

CONTROL = NoVerdict("control tokens in the text")
REFUSED = "the server refused the request"
MALFORMED = "the server's reply cannot be read"
# A server may read these as its model's control tokens: a text that holds one could end its own turn.
_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
)


class Api(ServerOptions, Judge):
    """A model behind an OpenAI-compatible server rates each answer 1 to 5, or compares them in both orders.

    Asked greedily. Where the server gives log-probs, a verdict is read from the probabilities of the rating
    tokens at the position of the written rating (as G-Eval does); else only the written rating counts.
    """

    mode: Literal["pointwise", "pairwise"] = "pairwise"
    """pointwise: expected rating, 1 to 5. pairwise: mean share of wins over opponents and both orders, 0 to 1."""
    criterion: str | None = None
    """What to judge by ("honesty"); without it, overall quality."""
    ties: bool = False
    """pairwise: offer "equally good" as a third choice; it counts as half a win."""
    max_tokens: int = Field(default=16, ge=2)
    """Tokens of a reply, its end included; a model that reasons first needs more, and must end with a line that is the verdict."""
    logprobs: bool = True
    """Ask for the log-probs of tokens; false for servers that refuse such requests."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More fields of each request, such as llama.cpp's grammar or vLLM's structured_outputs, which force a small
    model to answer in form."""
    verdicts: str = "runs/verdicts.jsonl"
    """File that verdicts are appended to and known ones are taken from; several runs may share it."""

    @model_validator(mode="after")
    def _ties_are_between_two(self) -> Api:
        if self.ties and self.mode != "pairwise":
            raise ValueError("judge.ties needs judge.mode pairwise; set that, or leave ties out")
        return self

    def check(self) -> None:
        """ApiError where the client or the key is missing."""
        demand_client(self)

    def open(
        self, policy: Engine | None, prompts: PromptSet, initial: Initial | None = None
    ) -> OpenJudge:
        """Read the known verdicts. ApiError where the client or key is missing, JudgeError for the file."""
        return _OpenApi(
            ChatServer(self),
            question(self.mode, prompts, self.criterion, self.ties),
            VerdictFile(Path(self.verdicts)),
            self,
        )


class StoredReply(Record):
    """The reply to one request: one line of the file of verdicts."""

    key: str
    """Hash of the server's address and the whole request."""
    reply: str
    """The model's text, or the server's message where it refused."""
    row: tuple[float, ...] | None = None
    """Probability of each option; None where there is no verdict."""
    failure: str | None = None
    """Why there is no verdict."""
    check: str = ""
    """Hash of the rest of the line."""

    def checked(self) -> StoredReply:
        """The same with its hash."""
        rest = self.model_copy(update={"check": ""}).model_dump_json()
        return self.model_copy(update={"check": blake2b(rest.encode(), digest_size=8).hexdigest()})


class VerdictFile:
    """An append-only file of replies by key."""

    def __init__(self, path: Path) -> None:
        """Read the file; an incomplete last line is removed. Raises JudgeError."""
        self._path = path
        self.replies: dict[str, StoredReply] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            data = path.read_bytes()
        except OSError as error:
            raise JudgeError(
                f"judge.verdicts: cannot use {path} ({error.strerror}); name a file that can be written"
            ) from error
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            os.truncate(path, complete)
        for number, line in enumerate(data[:complete].split(b"\n")[:-1], start=1):
            try:
                reading = StoredReply.model_validate_json(line)
            except ValidationError as error:
                raise JudgeError(
                    f"{path}:{number} is no verdict ({error.errors()[0]['msg']}); delete that line, or "
                    "name another file in judge.verdicts"
                ) from error
            if reading.checked().check != reading.check:
                raise JudgeError(
                    f"{path}:{number} is not as it was written; delete that line, and its verdict is asked "
                    "for again"
                )
            self.replies[reading.key] = reading

    def add(self, reading: StoredReply) -> None:
        """Append a reply with one synced write, so that several runs can share the file."""
        self.replies[reading.key] = reading
        line = (reading.checked().model_dump_json() + "\n").encode()
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class _OpenApi:
    server: ChatServer
    question: Question
    file: VerdictFile
    options: Api

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[str]]) -> list[Verdict]:
        refusals = [self._refusal(p, group) for p, group in zip(prompts, groups, strict=True)]
        asks_by_group = [
            [] if refusal else [self._ask(messages) for messages in self.question.ask(p, group)]
            for p, group, refusal in zip(prompts, groups, refusals, strict=True)
        ]
        readings = self._stored_replies([ask for group in asks_by_group for ask in group])
        return [
            refusal or self._verdict([next(readings) for _ in questions], len(group))
            for group, refusal, questions in zip(groups, refusals, asks_by_group, strict=True)
        ]

    def _refusal(self, prompt: Prompt, group: Sequence[str]) -> NoVerdict | None:
        texts = [*(message.content for message in prompt.messages), *group]
        refusal = self.question.refusal(group)
        return refusal or (CONTROL if any(map(_CONTROL.search, texts)) else None)

    def _ask(self, messages: Sequence[Message]) -> Ask:
        # 20 is the maximum of OpenAI's API, and more than the number of options.
        top = 20 if self.options.logprobs else None
        return Ask(
            messages, self.options.max_tokens, seed=0, top_logprobs=top, extra=self.options.extra
        )

    def _key(self, ask: Ask) -> str:
        parts = [self.options.url, ask.body(self.options.model), self.question.options]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _stored_replies(self, asks: Sequence[Ask]) -> Iterator[StoredReply]:
        """One reply per request, in order; only requests that the file does not hold are sent, each once."""
        keys = [self._key(ask) for ask in asks]
        new = {
            key: ask for key, ask in zip(keys, asks, strict=True) if key not in self.file.replies
        }
        refused: dict[str, StoredReply] = {}
        with Bar("judge's server", len(new)) as bar:
            for index, reply in self.server.each(list(new.values())):
                key = list(new)[index]
                if isinstance(reply, Refused):
                    # Not stored: another attempt may succeed, and this one cost nothing.
                    logger.warning("the judge's server refuses a request: %s", reply.detail)
                    reason = MALFORMED if reply.malformed else REFUSED
                    refused[key] = StoredReply(key=key, reply=reply.detail, failure=reason)
                else:
                    self.file.add(read(key, reply, self.question.options))
                bar.advance(items=1)
        return iter([refused.get(key) or self.file.replies[key] for key in keys])

    def _verdict(self, readings: Sequence[StoredReply], size: int) -> Verdict:
        rows = []
        for reading in readings:
            if reading.row is None:
                return NoVerdict(reading.failure or REFUSED)
            rows.append(reading.row)
        return finite(self.question.read(rows, size))


def read(key: str, reply: Reply, options: Sequence[str]) -> StoredReply:
    """Parse a reply into the probability of each option; no verdict where the text does not name exactly one."""
    text = reply.text
    if reply.finish == "length":
        text = text.rpartition("\n")[0]  # the last line may be incomplete: "1" of "10"
    try:
        chosen = read_verdict(text, options)
    except ValueError as error:
        return StoredReply(key=key, reply=reply.text, failure=str(error))
    written = tuple(float(option == chosen) for option in options)
    return StoredReply(
        key=key, reply=reply.text, row=_option_probabilities(reply, chosen, options) or written
    )


def _option_probabilities(
    reply: Reply, chosen: str, options: Sequence[str]
) -> tuple[float, ...] | None:
    """Probabilities of the options at the verdict's token; None where the log-probs do not show that token."""
    verdict_tokens = [token for token in reply.tokens if token.text.strip().upper() == chosen]
    if len(verdict_tokens) != 1:
        return None
    mass = dict.fromkeys(options, 0.0)
    for text, logprob in verdict_tokens[0].top or (
        (verdict_tokens[0].text, verdict_tokens[0].logprob),
    ):
        if text.strip().upper() in mass:
            mass[text.strip().upper()] += math.exp(logprob)
    total = math.fsum(mass.values())
    return tuple(p / total for p in mass.values()) if mass[chosen] > 0 else None
