"""What one stage hands to the next: frozen records, one JSON line each, read and written here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from prefloop.errors import RunFolderError

Finish = Literal["stop", "length"]

_Text = Annotated[str, Field(min_length=1)]


def as_tuple(value: object) -> object:
    """A list passes for a tuple, also where strict validation no longer knows that it came from JSON."""
    return tuple(value) if isinstance(value, list) else value


class Record(BaseModel):
    """A frozen record; unknown fields are an error, so that old files never pass as new ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(Record):
    """A conversation that waits for an answer."""

    id: str
    messages: tuple[Message, ...] = Field(min_length=1)
    """The turns so far; the last one is the user's."""
    target: str | None = None
    """The data set's own answer (y_t), where it has one."""
    chosen: str | None = None
    """The better answer of a labelled pair, where the data hold one and the method trains on it."""
    rejected: str | None = None
    """The worse answer of that pair."""

    @property
    def text(self) -> str:
        """The user's last turn."""
        return self.messages[-1].content


class Response(Record):
    """One answer: as a model gave it, or as the data hold it."""

    text: str
    """The answer that people and judges read."""
    token_ids: tuple[int, ...] = ()
    """The tokens that the policy sampled, thought and end of turn included. They are what is scored and trained
    on; the text is never encoded again. Empty where the policy sampled none (targets, labelled pairs, infilled
    flaws, another model's answers): only then is the text encoded, in its conversation."""
    reasoning: str = ""
    """What the model thought before it answered, where its template keeps thoughts apart."""
    mean_logprob: float | None = None
    """Mean log-probability per token (nats) under the policy that sampled it, at temperature 1."""
    finish: Finish = "stop"
    """"length" when the token limit cut the answer off."""


class Candidates(Record):
    """All that was generated for one prompt, by name ("draft_a", "refined", ...), and what it scored."""

    prompt: Prompt
    responses: dict[str, Response]
    scores: dict[str, float] = {}
    """Judge's score by response name; higher is better."""
    ratings: dict[str, float] = {}
    """Numbers about the group that are not a judge's score (severity of the flaw, mean log-probs ...)."""


class Pair(Record):
    """One training example: chosen over rejected, with a third answer where the method trains on triples."""

    prompt_id: str
    round: int
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    """Empty where the method trains on single answers (sft)."""
    target: str | None = None
    sample: str | None = None
    """The policy's own answer beside a pair that is not made of such answers (SPAC's y)."""
    margin: float = 0.0
    """AROP's M: what the implicit reward difference must exceed; 0 elsewhere."""
    smoothing: float = Field(default=0.0, ge=0.0, le=0.5)
    """SPA's alpha: how far the label is trusted to be the wrong way round; 0 elsewhere."""
    origin: dict[str, str] = {}
    """Which candidate became what, for example {"chosen": "refined", "rejected": "flawed"}."""
    unfinished: tuple[str, ...] = ()
    """Roles whose answer the length limit cut off: trained on without an end-of-turn token."""
    token_ids: dict[str, tuple[int, ...]] = {}
    """By role, the tokens that the policy sampled: what is trained on. A role that is not here was not sampled
    by the policy, and its text is encoded in its conversation."""
    scores: dict[str, float] = {}
    """The judge's scores of chosen and rejected, where a judge decided."""
    ratings: dict[str, float] = {}
    """What the margin was made from: confidences, or the flaw's severity by axis."""

    @property
    def id(self) -> str:
        """Unique within a run."""
        return f"{self.round:04d}/{self.prompt_id}"

    @property
    def exportable(self) -> bool:
        """Whether others can train on it: two answers, both whole, as other trainers end every one with a turn."""
        return bool(self.rejected) and not self.unfinished

    def answer(self, role: str) -> Response:
        """The answer of one role as it is trained on; empty where the pair has none."""
        return Response(
            text=getattr(self, role) or "",
            token_ids=self.token_ids.get(role, ()),
            finish="length" if role in self.unfinished else "stop",
        )


class Reject(Record):
    """A prompt that gave no pair, and why. Rejects are counted, never turned into data."""

    prompt_id: str
    stage: str
    reason: str
    """A short fixed phrase ("empty answer"), so that rejects can be counted by it."""
    detail: str = ""
    """What exactly was seen, for the person who looks at it."""


class Sampling(Record):
    """How tokens are drawn."""

    temperature: float = Field(default=0.7, ge=0.0, le=5.0)
    """0 is greedy decoding. IAL section 4.1 samples at 0.7."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling; 1 switches it off."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0 switches it off."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Leave out tokens less likely than this share of the likeliest one's probability; 0 switches it off."""
    stop: Annotated[tuple[_Text, ...], BeforeValidator(as_tuple)] = ()
    """Texts that end an answer; the answer is what comes before."""
    max_new_tokens: int = Field(default=256, ge=1, le=2**20)
    """An answer that reaches this length is marked finish="length"."""


class Request(Record):
    """One conversation to be continued by an engine."""

    messages: tuple[Message, ...]
    prefix: str = ""
    """Text with which the answer already begins; the engine continues it and returns only what is new."""


class Scored(Record):
    """A given answer under a model. T tokens; the last one is end-of-turn, unless the answer was cut off."""

    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    """[T] character span of each token in the answer's text; empty ones for end-of-turn and for thoughts."""
    logprobs: tuple[float, ...]
    """[T] log-probability (nats) of each token at temperature 1, given the prompt and those before it."""
    top_texts: tuple[tuple[str, ...], ...] = ()
    """[T, k] the k likeliest tokens at each position as text, likeliest first, where asked for."""
    top_logprobs: tuple[tuple[float, ...], ...] = ()
    """[T, k] and their log-probabilities."""

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability per token (nats); 0 for an answer that was cut off before its first token."""
        return sum(self.logprobs) / max(1, len(self.logprobs))


class RoundResult(Record):
    """The measures of one round; None where a measure has no value."""

    round: int
    """-1 is the policy before the first round."""
    measures: dict[str, float | None]


class CurvePoint(Record):
    """The win rate against the start in the middle of a round's training."""

    round: int
    step: int
    """Optimiser steps of the whole run so far; those of supervised fine-tuning do not count."""
    win_rate: float | None
    """None where the judge had no verdict on any prompt."""
    low: float | None
    """95 % bootstrap interval over prompts."""
    high: float | None
    score: float | None
    """The judge's mean score."""
    prompts: int
    """With a verdict on both sides."""


class TokenLogps(Record):
    """One answer token by token. T tokens; end-of-turn, where it was scored, is the last, with no text."""

    pieces: tuple[str, ...]
    """[T] the stretch of the answer that each token stands for; together they are the answer."""
    policy: tuple[float, ...]
    """[T] log-probability (nats) under the policy after the pair's round."""
    reference: tuple[float, ...]
    """[T] log-probability (nats) under the reference of that round's loss."""


class PairRatios(Record):
    """What training did to the answers of one pair: log-probs of each token before and after."""

    pair: str
    """The pair's id."""
    roles: dict[str, TokenLogps]


R = TypeVar("R", bound=Record)


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write records, one JSON line each, replacing the file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(record.model_dump_json() + "\n" for record in records)


def read_jsonl(path: Path, kind: type[R], *, growing: bool = False) -> Iterator[R]:
    """Read a file of records of one kind; a damaged line is named by file and number.

    Of a `growing` file a last line without its end is left out: it is being written, or its writer was killed.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is gone; delete {path.parent} to redo the round") from error
    with file:
        for number, line in enumerate(file, start=1):
            if growing and not line.endswith(b"\n"):
                return
            try:
                yield kind.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]["msg"]
                raise RunFolderError(
                    f"{path}:{number} is not a {kind.__name__} record ({first}); "
                    f"delete {path.parent} to redo the round"
                ) from error


def read_json(path: Path) -> dict[str, object]:
    """Read a small JSON object of ours, such as a manifest."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
        raise RunFolderError(
            f"{path} is damaged ({error}); delete {path.parent} to make all in it again"
        ) from error
    if not isinstance(value, dict):
        raise RunFolderError(
            f"{path} holds no JSON object; delete {path.parent} to make all in it again"
        )
    return value


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path such as (run seed, round, stage, chunk); equal paths, equal seeds."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1


GENERATED = "generated_tokens"

READ = "read_tokens"
