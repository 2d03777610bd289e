"""A policy in memory as lm-evaluation-harness wants a model: its tokenisation, our scoring and decoding.

Contexts and continuations become tokens exactly as in the harness's own class for transformers models (HFLM), so
that the log-probabilities are those of its command line. What differs is how they are computed:
generate/scoring.py computes a beginning that several rows share once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from pydantic import ConfigDict

from prefloop.errors import GenerationError
from prefloop.evaluate.cache import cached_records, digest
from prefloop.machine import Bar
from prefloop.models.chat import Chat
from prefloop.models.chat_template import dated
from prefloop.records import Record, Response, Sampling

if TYPE_CHECKING:
    from prefloop.generate.engine import TokenEngine

Row = tuple[tuple[int, ...], int]
"""Tokens, and from which on they are scored."""

# So many are asked between two files; the slots empty at each end, so not few.
_SCORED_AT_A_TIME = 512
_DECODED_AT_A_TIME = 128


class _Kind(NamedTuple):
    """How an answer is generated."""

    stop: list[str]
    limit: int
    """Tokens at most."""
    room: int
    """Tokens that a prompt may have."""


class _Likelihood(Record):
    """Of a continuation; JSON alone would lose what has the probability 0."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    logprob: float
    greedy: bool


class PolicyLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of an engine; what it has answered is kept in `folder`, so that a killed evaluation goes on."""

    def __init__(
        self, engine: TokenEngine, model: Any, tokenizer: Any, folder: Path, seed: int
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length: int = resolve_max_length(model.config, tokenizer)
        self.cut = 0
        """How many prompts lost their beginning, as they were longer than the model's window."""
        self._engine, self._folder, self._seed = engine, folder, seed
        chat: Chat | None = getattr(engine, "chat", None)
        self._arguments = chat.template.arguments if chat else {}

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing precedes."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens as the tokenizer gives them by itself, without a second beginning-of-text."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turns as text; a template that refuses the system's turn gets none."""

        def render(turns: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    chat_template=dated(self.tokenizer.get_chat_template()),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **self._arguments,
                )
            )

        try:
            return render(chat_history)
        except TemplateError:
            return render([turn for turn in chat_history if turn["role"] != "system"])

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation, and whether greedy decoding would give it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        # By tokens, so that rows which begin alike are scored in one go.
        distinct = sorted(set(rows))
        place = self._folder / digest("likelihoods", *map(digest, distinct))
        with Bar("score", len(distinct)) as bar:

            def work(part: Sequence[Row], number: int) -> Iterable[_Likelihood]:
                bar.at(number * _SCORED_AT_A_TIME)
                ids, starts = zip(*part, strict=True)
                for found in self._engine.score_tokens(ids, starts):
                    greedy = all(found.likeliest)
                    yield _Likelihood(logprob=sum(found.logprobs), greedy=greedy)

            scores = cached_records(place, distinct, _Likelihood, work, chunk=_SCORED_AT_A_TIME)
        found = dict(zip(distinct, scores, strict=True))
        return [(found[row].logprob, found[row].greedy) for row in rows]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """The tokens that fit into the model's window, its last one needing no place; and where scoring starts."""
        ids = context + continuation
        self.cut += len(ids) > self.max_length + 1
        ids = ids[-self.max_length - 1 :]
        if len(continuation) >= len(ids):
            raise GenerationError(
                f"a choice of {len(continuation)} tokens leaves no room for its question in the model's "
                f"window of {self.max_length} tokens; leave out this task"
            )
        return tuple(ids), len(ids) - len(continuation)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations up to the first stop text."""
        by_kind: dict[str, dict[str, Any]] = {}
        for context, options in (request.args for request in requests):
            by_kind.setdefault(repr(options), {})[context] = options
        found = {kind: self._answers(asked) for kind, asked in by_kind.items()}
        return [found[repr(r.args[1])][r.args[0]] for r in requests]

    def _answers(self, asked: dict[str, Any]) -> dict[str, str]:
        """By context; all are `asked` with the same options."""
        kind = self._kind(next(iter(asked.values())))
        prompts = [self._prompt(context, kind.room) for context in asked]

        def work(part: Sequence[list[int]], number: int) -> Iterable[Response]:
            return [Response(text=text) for text in self._generated(part, kind)]

        place = self._folder / digest("answers", kind, prompts)
        answers = cached_records(place, prompts, Response, work, chunk=_DECODED_AT_A_TIME)
        return {context: answer.text for context, answer in zip(asked, answers, strict=True)}

    def _kind(self, options: dict[str, Any]) -> _Kind:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(options, 256))
        assert not wanted["do_sample"], "the leaderboard's tasks decode greedily"
        end = self.tokenizer.decode(self.eot_token_id)
        stop = handle_stop_sequences(wanted["until"], eos=end)
        room = self.max_length - wanted["max_gen_toks"]
        if room < 1:
            raise GenerationError(
                f"answers of {wanted['max_gen_toks']} tokens leave no room for a question in the model's "
                f"window of {self.max_length} tokens; leave out this task"
            )
        return _Kind(stop, wanted["max_gen_toks"], room)

    def _prompt(self, context: str, room: int) -> list[int]:
        ids = self.tok_encode(context)
        self.cut += len(ids) > room
        return ids[-room:]

    def _generated(self, prompts: Sequence[list[int]], kind: _Kind) -> list[str]:
        sampling = Sampling(
            temperature=0,
            stop=tuple(text for text in kind.stop if text),
            max_new_tokens=kind.limit,
        )
        found = self._engine.continue_tokens(prompts, sampling, seed=self._seed, label="answer")
        return [
            postprocess_generated_text(
                self.tokenizer.decode(ids, skip_special_tokens=True), kind.stop, None
            )
            for ids in found
        ]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Perplexity of whole texts, which none of the leaderboard's tasks asks for."""
        raise NotImplementedError
