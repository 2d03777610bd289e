"""A policy in memory as lm-evaluation-harness wants a model: its tokenisation, our scoring and decoding.

Contexts and continuations become tokens exactly as in the harness's own class for transformers models (HFLM), so
that the log-probabilities are those of its command line. What differs is how they are computed:
generate/scoring.py computes a beginning that several rows share once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)

from prefloop.errors import GenerationError
from prefloop.evaluate.answered import Answered
from prefloop.progress import Bar
from prefloop.records import Sampling

if TYPE_CHECKING:
    from prefloop.generate.engine import TokenEngine

T = TypeVar("T")

# So many are asked between two notes on disk; the slots empty at each end, so not few.
_SCORED_AT_A_TIME = 512
_DECODED_AT_A_TIME = 128


class _Kind(NamedTuple):
    """How an answer is generated."""

    stop: list[str]
    limit: int
    """Tokens at most."""
    room: int
    """Tokens that a prompt may have."""


class PolicyLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of an engine."""

    def __init__(
        self, engine: TokenEngine, model: Any, tokenizer: Any, answered: Answered, seed: int
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length: int = resolve_max_length(model.config, tokenizer)
        self.cut = 0
        """How many prompts lost their beginning, as they were longer than the model's window."""
        self._engine, self._answered, self._seed = engine, answered, seed

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
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
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
        keys = [self._answered.key("loglikelihood", *texts) for texts, _, _ in requests]
        rows = {
            key: self._row(context, continuation)
            for key, (_, context, continuation) in zip(keys, requests, strict=True)
        }
        new = {key: row for key, row in rows.items() if key not in self._answered}
        with Bar("score", len(rows)) as bar:
            bar.at(len(rows) - len(new))
            # By tokens, so that rows which begin alike are scored in one go.
            for part in _parts(sorted(new, key=lambda key: new[key][0]), _SCORED_AT_A_TIME):
                ids, starts = zip(*(new[key] for key in part), strict=True)
                scores = self._engine.score_tokens(ids, starts)
                self._answered.add(
                    {
                        key: (sum(found.logprobs), all(found.likeliest))
                        for key, found in zip(part, scores, strict=True)
                    }
                )
                bar.advance(items=len(part))
        return [(logprob, greedy) for logprob, greedy in map(self._answered.__getitem__, keys)]

    def _row(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """The tokens that fit into the model's window, its last one needing no place; and where scoring starts."""
        ids = context + continuation
        self.cut += len(ids) > self.max_length + 1
        ids = ids[-self.max_length - 1 :]
        if len(continuation) >= len(ids):
            raise GenerationError(
                f"a choice of {len(continuation)} tokens leaves no room for its question in the model's "
                f"window of {self.max_length} tokens; leave out this task"
            )
        return ids, len(ids) - len(continuation)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations up to the first stop text."""
        keys = [self._answered.key("generate_until", *request.args) for request in requests]
        asked = dict(zip(keys, (request.args for request in requests), strict=True))
        by_kind: dict[str, list[str]] = {}
        for key, (_, options) in asked.items():
            by_kind.setdefault(repr(options), []).append(key)
        for same in by_kind.values():
            kind = self._kind(asked[same[0]][1])
            prompts = {key: self._prompt(asked[key][0], kind.room) for key in same}
            new = [key for key in same if key not in self._answered]
            for part in _parts(new, _DECODED_AT_A_TIME):
                found = self._generated([prompts[key] for key in part], kind)
                self._answered.add(dict(zip(part, found, strict=True)))
        return [str(self._answered[key]) for key in keys]

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


def _parts(values: Iterable[T], size: int) -> Iterator[list[T]]:
    values = iter(values)
    while part := list(islice(values, size)):
        yield part
