"""A loaded policy as a model of lm-evaluation-harness: the harness's tokenisation, our scoring and decoding.

Contexts and continuations become tokens exactly as in the harness's own class for transformers models (HFLM), so
that the log-probabilities are those of its command line. Only the computation differs: generate/scoring.py
computes a prefix that several rows share once.
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
"""Token ids, and the index of the first one that is scored."""

# Rows per cache file. Small chunks waste time: slots drain at each chunk's end.
_SCORED_PER_FILE = 512
_DECODED_PER_FILE = 128


class _Decoding(NamedTuple):
    """How answers are generated; texts in `stop` end them."""

    stop: list[str]
    max_new_tokens: int
    """Tokens of an answer at most."""
    max_prompt_tokens: int
    """Tokens of a prompt at most; a longer one loses its beginning."""


class _Likelihood(Record):
    """Log-likelihood of a continuation (log 0 = -inf is kept as a JSON constant)."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    logprob: float
    greedy: bool


class PolicyLM(TemplateLM):  # type: ignore[misc]
    """An engine as an lm-eval model; answers are cached in `folder`, so that a killed evaluation can continue."""

    def __init__(
        self, engine: TokenEngine, model: Any, tokenizer: Any, folder: Path, seed: int
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length: int = resolve_max_length(model.config, tokenizer)
        self.cut = 0
        """Number of prompts that lost their beginning, being longer than the model's window."""
        self._engine, self._folder, self._seed = engine, folder, seed
        chat: Chat | None = getattr(engine, "chat", None)
        self._arguments = chat.template.arguments if chat else {}

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without context: beginning-of-text, else end-of-text."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness's caches tell tokenizers apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The text's token ids with the tokenizer's special tokens, but no second beginning-of-text."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; the system turn is dropped where the template refuses it."""

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
        """Log-probability (nats) of each continuation, and whether greedy decoding yields it."""
        likelihoods: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        # Sorted by tokens, so that rows with a common prefix are scored together.
        distinct = sorted(set(rows))
        cache_folder = self._folder / digest("likelihoods", *map(digest, distinct))
        with Bar("score", len(distinct)) as bar:

            def work(part: Sequence[Row], number: int) -> Iterable[_Likelihood]:
                bar.at(number * _SCORED_PER_FILE)
                ids, starts = zip(*part, strict=True)
                for scored in self._engine.score_tokens(ids, starts):
                    greedy = all(scored.likeliest)
                    yield _Likelihood(logprob=sum(scored.logprobs), greedy=greedy)

            scores = cached_records(
                cache_folder, distinct, _Likelihood, work, chunk=_SCORED_PER_FILE
            )
        likelihoods = dict(zip(distinct, scores, strict=True))
        return [(likelihoods[row].logprob, likelihoods[row].greedy) for row in rows]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """The tokens that fit into the window (the last one is no input), and the index where scoring starts."""
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
        contexts_by_options: dict[str, dict[str, Any]] = {}
        for context, options in (request.args for request in requests):
            contexts_by_options.setdefault(repr(options), {})[context] = options
        answers = {
            key: self._answers(options_by_context)
            for key, options_by_context in contexts_by_options.items()
        }
        return [answers[repr(r.args[1])][r.args[0]] for r in requests]

    def _answers(self, options_by_context: dict[str, Any]) -> dict[str, str]:
        """The answers by context; all contexts have the same options."""
        decoding = self._decoding(next(iter(options_by_context.values())))
        prompts = [
            self._prompt(context, decoding.max_prompt_tokens) for context in options_by_context
        ]

        def work(part: Sequence[list[int]], number: int) -> Iterable[Response]:
            return [Response(text=text) for text in self._generate(part, decoding)]

        cache_folder = self._folder / digest("answers", decoding, prompts)
        answers = cached_records(cache_folder, prompts, Response, work, chunk=_DECODED_PER_FILE)
        return {
            context: answer.text
            for context, answer in zip(options_by_context, answers, strict=True)
        }

    def _decoding(self, options: dict[str, Any]) -> _Decoding:
        normalized: dict[str, Any] = dict(normalize_gen_kwargs(options, 256))
        assert not normalized["do_sample"], "the leaderboard's tasks decode greedily"
        end_of_text = self.tokenizer.decode(self.eot_token_id)
        stop = handle_stop_sequences(normalized["until"], eos=end_of_text)
        max_prompt_tokens = self.max_length - normalized["max_gen_toks"]
        if max_prompt_tokens < 1:
            raise GenerationError(
                f"answers of {normalized['max_gen_toks']} tokens leave no room for a question in the model's "
                f"window of {self.max_length} tokens; leave out this task"
            )
        return _Decoding(stop, normalized["max_gen_toks"], max_prompt_tokens)

    def _prompt(self, context: str, max_prompt_tokens: int) -> list[int]:
        ids = self.tok_encode(context)
        self.cut += len(ids) > max_prompt_tokens
        return ids[-max_prompt_tokens:]

    def _generate(self, prompts: Sequence[list[int]], decoding: _Decoding) -> list[str]:
        sampling = Sampling(
            temperature=0,
            stop=tuple(text for text in decoding.stop if text),
            max_new_tokens=decoding.max_new_tokens,
        )
        continuations = self._engine.continue_tokens(
            prompts, sampling, seed=self._seed, label="answer"
        )
        return [
            postprocess_generated_text(
                self.tokenizer.decode(ids, skip_special_tokens=True), decoding.stop, None
            )
            for ids in continuations
        ]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Not supported: none of the leaderboard's tasks measures the perplexity of whole texts."""
        raise NotImplementedError
