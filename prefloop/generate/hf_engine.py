"""Generation in process, on the Hugging Face model that is being trained: nothing is converted.

Answers are decoded in slots that are refilled as they end (decode.py). Every request has random numbers
of its own, so neither the number of slots nor an out-of-memory retry changes which numbers an answer is
drawn with.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefloop.errors import GenerationError
from prefloop.generate.cache_attention import slot_attention
from prefloop.generate.completion import (
    completion_ids,
    places_at,
    sampled_response,
    scored_answer,
    stop_place,
)
from prefloop.generate.cpu.prepared import Prepared, fingerprint
from prefloop.generate.decode import STEP_TOKENS, Sampled, Task, decode
from prefloop.generate.engine import TokenScores
from prefloop.generate.fallback import (
    generate,
    reads_padding,
    slot_decoding_unsupported,
    windows_of,
)
from prefloop.generate.kv_cache import Slots
from prefloop.generate.scoring import Wanted, joined, score, scores_of
from prefloop.machine import Bar, is_out_of_memory
from prefloop.models.chat import Chat, named_ends
from prefloop.models.policy import Policy
from prefloop.models.sources import ModelOptions
from prefloop.records import Request, Response, Sampling, Scored, derive_seed

# B rows, T positions, V vocabulary, O options.

log = logging.getLogger(__name__)
T = TypeVar("T")


class HFEngine:
    """An Engine over a loaded model; always uses the weights as they are at the call."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`model`: a causal LM, PEFT-wrapped or not. `batch_size` rows are decoded together; out of memory halves it for the rest of the run."""
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.chat = Chat.of(self.model, tokenizer, template_kwargs)
        self.batch_size = batch_size
        self._served: dict[int, bool] = {}
        """Whether slots serve the model, by the number of its windows that conversations exceed."""
        self.release()

    def release(self) -> None:
        """Give up the memory that is kept from one call to the next: conversations, reordered weights."""
        self._weights: tuple[object, ...] | None = None
        self._slots: Slots | None = None
        self._prepared: Prepared | None = None

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """One response per request, in their order."""

        def ended(ids: list[int]) -> bool:
            return self.chat.is_ended(ids) or stop_place(self.chat, ids, sampling.stop) is not None

        prompts = [self._prompt(request) for request in requests]
        found = self._decode(_tasks(prompts, sampling, seed), sampling, ended, label)
        return [
            sampled_response(
                self.chat, request, sampling, found[place].ids, _finite(found[place].logprobs)
            )
            for place, request in enumerate(requests)
        ]

    def continue_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        label: str = "generate",
    ) -> list[list[int]]:
        """What follows each prompt, without a chat template: as TokenEngine says."""
        stops = {self.chat.tokenizer.eos_token_id, *named_ends(self.model)}

        def ended(ids: list[int]) -> bool:
            if ids[-1] in stops:
                return True
            text = self.chat.tokenizer.decode(ids) if sampling.stop else ""
            return any(stop in text for stop in sampling.stop)

        found = self._decode(_tasks(prompts, sampling, seed), sampling, ended, label)
        return [found[place].ids for place in range(len(prompts))]

    def _decode(
        self,
        tasks: Sequence[Task],
        sampling: Sampling,
        ended: Callable[[list[int]], bool],
        label: str,
    ) -> dict[int, Sampled]:
        """Continue all tasks, by place; in slots where the model can be decoded so."""
        found: dict[int, Sampled] = {}
        prompts = [task.prompt for task in tasks]
        longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        with Bar(label, len(tasks)) as bar, _evaluating(self.model):

            def finished(place: int, sampled: Sampled) -> None:
                found[place] = sampled
                bar.advance(items=1, amount=len(sampled.ids))

            def batch(places: list[int]) -> list[None]:
                rows = [tasks[place] for place in places]
                padded = _pad([row.prompt for row in rows], self.model.device, left=True)
                answers = generate(self.model, rows, sampling, ended, padded)
                for place, sampled in zip(places, answers, strict=True):
                    finished(place, sampled)
                return [None] * len(places)

            if tasks and not self._servable(longest):
                self._batched(prompts, batch)
            while todo := [place for place in range(len(tasks)) if place not in found]:
                done = partial(_at_place, finished, todo)
                with (
                    self._halve_batch_on_oom(max(len(prompts[place]) for place in todo)),
                    self._with_slots(len(todo), longest) as slots,
                ):
                    decode(self.model, slots, [tasks[p] for p in todo], sampling, ended, done)
        return found

    def _servable(self, longest: int) -> bool:
        """Whether conversations of `longest` tokens can be decoded in slots; if not, it is said once."""
        beyond = sum(longest > window for window in windows_of(self.model))
        while beyond not in self._served:
            with self._halve_batch_on_oom(longest), self._in_prepared_layers():
                reason = slot_decoding_unsupported(self.model, longest)
                self._served[beyond] = reason is None
                if reason is not None:
                    log.warning(
                        "generating with transformers' own loop, which is slower: %s cannot be decoded "
                        "in slots, as %s",
                        type(self.model).__name__,
                        reason,
                    )
        return self._served[beyond]

    @contextmanager
    def _with_slots(self, count: int, longest: int) -> Iterator[Slots]:
        """Room for the conversations, and the model prepared to use it."""
        with self._in_prepared_layers(), slot_attention(self.model):
            count = min(count, self.batch_size)
            if self._slots is None:
                self._slots = Slots(count, longest, self._shelf(count))
            self._slots.grow(count, longest, self._shelf(count))
            try:
                yield self._slots
            except BaseException:
                # Others that begin alike would wait for what an interrupted conversation has not computed.
                self._slots = None
                raise

    def _shelf(self, count: int) -> int:
        """A place for each slot's prompt, where a short one takes little memory."""
        return count if self.model.device.type == "cpu" else 0

    @contextmanager
    def _in_prepared_layers(self) -> Iterator[None]:
        """Inside, the model's layers are what `Prepared` has made of the weights as they are now."""
        weights = fingerprint(self.model)
        if weights != self._weights:
            self.release()
            self._weights, self._prepared = weights, Prepared(self.model)
        assert self._prepared is not None
        with self._prepared.in_use():
            yield

    def score(
        self,
        requests: Sequence[Request],
        answers: Sequence[Response],
        *,
        top: int = 0,
        at: Sequence[Collection[int]] | None = None,
    ) -> list[Scored]:
        """Log-probability of each given answer, or of its tokens that begin `at` some characters."""
        rows = [
            completion_ids(self.chat, request, answer)
            for request, answer in zip(requests, answers, strict=True)
        ]
        places_by_row: list[Sequence[int]] = [range(len(ids)) for ids in rows]
        if at is not None:
            places_by_row = [
                places_at(self.chat, ids, answer.text, characters)
                for ids, answer, characters in zip(rows, answers, at, strict=True)
            ]
        wanted = []
        for request, ids, places in zip(requests, rows, places_by_row, strict=True):
            if places:
                prompt = self._prompt(request)
                row = prompt + ids[: places[-1] + 1]
                wanted.append(Wanted(row, [len(prompt) + place for place in places]))
        found = iter(self._score(wanted, top))
        scored = []
        for answer, ids, places in zip(answers, rows, places_by_row, strict=True):
            s = next(found) if places else TokenScores([], [], [], [])
            scored.append(
                scored_answer(
                    self.chat,
                    answer,
                    ids,
                    _spread(s.logprobs, places, len(ids), math.nan),
                    _spread(s.top_ids, places, len(ids), []) if top else (),
                    _spread(s.top_logprobs, places, len(ids), []) if top else (),
                )
            )
        return scored

    def score_tokens(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[TokenScores]:
        """Scores of each row's tokens from its start on."""
        return self._score(
            [Wanted(row, range(start, len(row))) for row, start in zip(rows, starts, strict=True)],
            0,
        )

    def _score(self, wanted: Sequence[Wanted], top: int) -> list[TokenScores]:
        """In slots where the model can be served so, else in padded batches."""
        found: dict[int, TokenScores] = {}

        def finished(place: int, scores: TokenScores) -> None:
            _finite(scores.logprobs)
            found[place] = scores

        def forward(places: list[int]) -> list[None]:
            logits_BTV = self._logits([list(wanted[place].ids) for place in places])
            for place, logits_TV in zip(places, logits_BTV, strict=True):
                ids, positions = wanted[place]
                before = [position - 1 for position in positions]
                tokens = [ids[position] for position in positions]
                finished(place, joined(scores_of(logits_TV, before, tokens, top)))
            return [None] * len(places)

        longest = max((len(row.ids) for row in wanted), default=0)
        with _evaluating(self.model):
            if wanted and not self._servable(longest):
                # Scoring so keeps the logits of every position, decoding those of one.
                self._batched([list(row.ids) for row in wanted], forward, share=4)
            while todo := [place for place in range(len(wanted)) if place not in found]:
                with self._halve_batch_on_oom(longest):
                    rows = [wanted[place] for place in todo]
                    count = _slots_for(longest, len(rows), self.batch_size)
                    done = partial(_at_place, finished, todo)
                    with self._with_slots(count, longest) as slots:
                        score(self.model, slots, count, rows, top, done)
        return [found[place] for place in range(len(wanted))]

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Probability of each option as the next token."""
        rows = [
            self.chat.prompt_ids(request.messages, request.prefix, at_answer=True)
            for request in requests
        ]
        firsts = [self.chat.option_ids(r.messages, options, r.prefix) for r in requests]
        with _evaluating(self.model):
            if rows and self._servable(max(map(len, rows)) + 1):
                # Rows that differ in their last token alone are one row of scoring.
                wanted = [
                    Wanted([*row, first], [len(row)])
                    for row, options_of_row in zip(rows, firsts, strict=True)
                    for first in options_of_row
                ]
                found = iter(self._score(wanted, 0))
                return [
                    tuple(math.exp(next(found).logprobs[0]) for _ in options_of_row)
                    for options_of_row in firsts
                ]

            def forward(places: list[int]) -> list[tuple[float, ...]]:
                batch = [rows[place] for place in places]
                ids_BT, mask_BT = _pad(batch, self.model.device, left=True)
                probs_BV = _last_logits(self.model, ids_BT, mask_BT).softmax(dim=-1)
                first_BO = torch.tensor([firsts[p] for p in places], device=probs_BV.device)
                return [tuple(row) for row in probs_BV.gather(1, first_BO).tolist()]

            return self._batched(rows, forward)

    def _prompt(self, request: Request) -> list[int]:
        return self.chat.prompt_ids(request.messages, request.prefix)

    def _logits(self, rows: list[list[int]]) -> Tensor:
        ids_BT, mask_BT = _pad(rows, self.model.device, left=False)
        logits_BTV: Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return logits_BTV

    def _batched(
        self, rows: list[list[int]], work: Callable[[list[int]], list[T]], share: int = 1
    ) -> list[T]:
        """Run `work` on batches of similar length."""
        todo = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        done: dict[int, T] = {}
        while todo:
            places = todo[: max(1, self.batch_size // share)]
            alike = [place for place in places if len(rows[place]) == len(rows[places[0]])]
            if len(alike) < len(places) and not self._reads_padding:
                places = alike
            with self._halve_batch_on_oom(len(rows[places[0]]), share):
                done.update(zip(places, work(places), strict=True))
                todo = todo[len(places) :]
        return [done[place] for place in range(len(rows))]

    @cached_property
    def _reads_padding(self) -> bool:
        """Whether rows of different lengths may share a batch; if not, it is said once."""
        reads = reads_padding(self.model)
        if not reads:
            log.warning(
                "only prompts of one length share a batch: longer ones would change what %s computes",
                type(self.model).__name__,
            )
        return reads

    @contextmanager
    def _halve_batch_on_oom(self, longest: int, share: int = 1) -> Iterator[None]:
        """Out of memory halves the batch, for the caller to try again; what no batch can mend is an error."""
        try:
            yield
        except IndexError as error:  # of a table of learned positions
            raise GenerationError(
                f"a prompt of {longest} tokens and its answer go beyond the model's "
                f"window of {getattr(self.model.config, 'max_position_embeddings', '?')} tokens; "
                "lower data.max_prompt_tokens or method.sampling.max_new_tokens"
            ) from error
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self.batch_size <= share:
                raise GenerationError(
                    f"out of memory with a single row of {longest} prompt tokens; "
                    "lower sampling.max_new_tokens or data.max_prompt_tokens"
                ) from error
            self.release()
            self.batch_size = max(share, self.batch_size // 2)
            log.warning("out of memory: going on with %d rows at a time", self.batch_size // share)


def _at_place(
    finished: Callable[[int, T], None], places: Sequence[int], number: int, result: T
) -> None:
    finished(places[number], result)


def _tasks(prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Task]:
    """Each prompt with random numbers of its own."""
    return [
        Task(
            list(prompt),
            np.random.Generator(np.random.Philox(derive_seed(seed, place))).random(
                sampling.max_new_tokens
            ),
        )
        for place, prompt in enumerate(prompts)
    ]


def _slots_for(longest: int, rows: int, batch_size: int) -> int:
    """As many slots as hold `batch_size` times a step's tokens: long rows fill a step by few."""
    return min(rows, batch_size, max(4, batch_size * STEP_TOKENS // longest))


def _spread(values: Sequence[T], places: Sequence[int], count: int, rest: T) -> list[T]:
    """Values at their places among `count`."""
    spread = [rest] * count
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread


def _finite(logprobs: list[float]) -> list[float]:
    if not all(map(math.isfinite, logprobs)):
        raise GenerationError(
            "the policy's log-probabilities are not finite: its weights are damaged, or overflow; "
            "try model.dtype float32, a lower train.lr or another model.source"
        )
    return logprobs


def _pad(
    rows: Sequence[Sequence[int]], device: torch.device, *, left: bool
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both (B, T). The fill value is masked, so any token id will do."""
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for number, row in enumerate(rows):
        span = slice(-len(row), None) if left else slice(len(row))
        ids_BT[number, span] = torch.tensor(row)
        mask_BT[number, span] = 1
    return ids_BT.to(device), mask_BT.to(device)


def _last_logits(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Logits (B, V), float32, for the token after the last of each row."""
    output = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=(mask_BT.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=1,
    )
    logits_BV: Tensor = output.logits[:, -1].float()
    return logits_BV


def open_engine(source: str) -> HFEngine:
    """Load a folder, Hub id or "embedded:NAME" for asking only. Raises ModelError."""
    # "full" means without an adapter; nothing trains here, so a GPU needs no float32.
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    options = ModelOptions(source=source, tuning="full", dtype=dtype)
    policy = Policy.load(options, trainable=False)
    return HFEngine(policy.model, policy.tokenizer)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients; undone at the end."""
    training = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
