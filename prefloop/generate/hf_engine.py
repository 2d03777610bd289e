"""Generation in process, on the Hugging Face model that is being trained: nothing is converted or copied.

Prompts are sorted by length and decoded in batches; rows that have finished leave the batch. Every
request has random numbers of its own, so neither batch size nor an out-of-memory retry changes which
numbers an answer is drawn with.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefloop.chat import Chat
from prefloop.errors import GenerationError
from prefloop.generate.decode_cache import decoding, reserve
from prefloop.memory import is_out_of_memory
from prefloop.progress import Bar
from prefloop.records import Request, Response, Sampling, Scored
from prefloop.seeds import derive_seed

# B rows, T positions, V vocabulary.

log = logging.getLogger(__name__)
T = TypeVar("T")

# Rows leave the batch in groups: each removal copies the cache.
_COMPACT_BELOW = 0.8


class HFEngine:
    """An Engine over a loaded model; always uses the weights as they are at the call."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32) -> None:
        """`model`: a causal LM, PEFT-wrapped or not. `batch_size` rows are decoded together; out of memory halves it for the rest of the run."""
        self.model = model
        self.chat = Chat(tokenizer)
        self.batch_size = batch_size

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, label: str = "generate"
    ) -> list[Response]:
        """One response per request, in their order."""
        rows = [self._prompt(request) for request in requests]
        with Bar(label, len(rows)) as bar, decoding(self.model):

            def decode(places: list[int]) -> list[Response]:
                uniforms = [
                    np.random.Generator(np.random.Philox(derive_seed(seed, place)))
                    for place in places
                ]
                sampled = _decode(
                    self.model,
                    [rows[p] for p in places],
                    sampling,
                    uniforms,
                    self.chat.stop_ids,
                    bar,
                )
                return [
                    self._response(ids, logprobs, bool(requests[place].prefix))
                    for place, (ids, logprobs) in zip(places, sampled, strict=True)
                ]

            return self._batched(rows, decode)

    def score(
        self, requests: Sequence[Request], answers: Sequence[str], *, top: int = 0
    ) -> list[Scored]:
        """Log-probability of each given answer."""
        prompts = [self._prompt(request) for request in requests]
        rows = [
            prompt + self.chat.answer_ids(answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        with decoding(self.model):

            def forward(places: list[int]) -> list[Scored]:
                logits_BTV = self._logits([rows[place] for place in places])
                return [
                    self._scored(logits_TV, len(prompts[place]), rows[place], answers[place], top)
                    for place, logits_TV in zip(places, logits_BTV, strict=True)
                ]

            # Scoring keeps the logits of every position, decoding those of one.
            return self._batched(rows, forward, share=4)

    def choose(
        self, requests: Sequence[Request], options: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Probability of each option as the next token, renormalised over the options."""
        firsts = [self.chat.text_ids(option)[0] for option in options]
        if len(set(firsts)) < len(firsts):
            raise GenerationError(
                f"the options {', '.join(options)} do not differ in their first token; "
                "use options that do, such as digits or letters"
            )
        rows = [self._prompt(request) for request in requests]
        with decoding(self.model):

            def forward(places: list[int]) -> list[tuple[float, ...]]:
                batch = [rows[place] for place in places]
                ids_BT, mask_BT = _pad(batch, self.model.device, left=True)
                logits_BV = _step(self.model, ids_BT, mask_BT, None)
                return [tuple(p) for p in logits_BV[:, firsts].softmax(dim=-1).tolist()]

            return self._batched(rows, forward)

    def _prompt(self, request: Request) -> list[int]:
        prefix = self.chat.text_ids(request.prefix) if request.prefix else []
        return self.chat.prompt_ids(request.messages) + prefix

    def _response(self, ids: list[int], logprobs: list[float], continues: bool) -> Response:
        stopped = ids[-1] in self.chat.stop_ids
        text = self.chat.decode(ids[:-1] if stopped else ids)
        return Response(
            text=text if continues else text.strip(),
            token_ids=tuple(ids),
            mean_logprob=sum(_finite(logprobs)) / len(logprobs),
            finish="stop" if stopped else "length",
        )

    def _logits(self, rows: list[list[int]]) -> Tensor:
        ids_BT, mask_BT = _pad(rows, self.model.device, left=False)
        logits_BTV: Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return logits_BTV

    def _scored(
        self, logits_TV: Tensor, start: int, ids: list[int], answer: str, top: int
    ) -> Scored:
        answer_ids = ids[start:]
        predicting = logits_TV[start - 1 : len(ids) - 1].float().log_softmax(dim=-1)
        chosen = predicting.gather(1, torch.tensor(answer_ids, device=predicting.device)[:, None])
        offsets = (*self.chat.text_offsets(answer), (len(answer), len(answer)))
        values, indices = predicting.topk(top, dim=-1) if top else (predicting[:, :0],) * 2
        return Scored(
            token_ids=tuple(answer_ids),
            offsets=offsets,
            logprobs=tuple(_finite(chosen[:, 0].tolist())),
            top_texts=tuple(map(self._token_texts, indices.long().tolist())) if top else (),
            top_logprobs=tuple(tuple(row) for row in values.tolist()) if top else (),
        )

    def _token_texts(self, ids: list[int]) -> tuple[str, ...]:
        """Each token as text. Some decoders drop the space of a text's first token, so another goes first."""
        first = self.chat.text_ids("x")
        rows = [first, *([*first, token] for token in ids)]
        texts = self.chat.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return tuple(text[len(texts[0]) :] for text in texts[1:])

    def _batched(
        self, rows: list[list[int]], work: Callable[[list[int]], list[T]], share: int = 1
    ) -> list[T]:
        """Run `work` on batches of similar length; out of memory halves the batch and goes on."""
        todo = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        done: dict[int, T] = {}
        while todo:
            size = max(1, self.batch_size // share)
            places = todo[:size]
            try:
                results = work(places)
            except IndexError as error:  # of a table of learned positions
                raise GenerationError(
                    f"a prompt of {len(rows[places[0]])} tokens and its answer go beyond the model's "
                    f"window of {getattr(self.model.config, 'max_position_embeddings', '?')} tokens; "
                    "lower data.max_prompt_tokens or method.sampling.max_new_tokens"
                ) from error
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise GenerationError(
                        f"out of memory with a single row of {len(rows[places[0]])} prompt tokens; "
                        "lower sampling.max_new_tokens or data.max_prompt_tokens"
                    ) from error
                self.batch_size = max(share, self.batch_size // 2)
                log.warning(
                    "out of memory: going on with %d rows at a time", self.batch_size // share
                )
                continue
            done.update(zip(places, results, strict=True))
            todo = todo[size:]
        return [done[place] for place in range(len(rows))]


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


def _step(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, cache: Any) -> Tensor:
    """Logits (B, V), float32, for the token after the last of `ids_BT`; `mask_BT` covers the past too."""
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    output = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    )
    logits_BV: Tensor = output.logits[:, -1].float()
    return logits_BV


def _draw(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """One token a row, (B,): the inverse of the cumulative distribution at a uniform number."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        kth = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    probs_BV = logits_BV.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probs_BV.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        probs_BV = probs_BV.scatter(1, order, ordered.masked_fill(outside, 0.0))
    cumulative_BV = probs_BV.cumsum(dim=-1)
    wanted_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    tokens_B = torch.searchsorted(cumulative_BV, wanted_B1, right=True)[:, 0]
    # A uniform number that rounds to 1 falls off the end; the likeliest token stands in.
    return torch.where(tokens_B < logits_BV.shape[1], tokens_B, probs_BV.argmax(dim=-1))


def _decode(
    model: PreTrainedModel,
    rows: list[list[int]],
    sampling: Sampling,
    random: list[np.random.Generator],
    stop_ids: frozenset[int],
    bar: Bar,
) -> list[tuple[list[int], list[float]]]:
    """Continue each row until a stop token or the limit; new ids and their log-probs at temperature 1."""
    device = model.device
    ids_BT, mask_BT = _pad(rows, device, left=True)
    cache = reserve(model, ids_BT.shape[1] + sampling.max_new_tokens)
    draws = np.stack([generator.random(sampling.max_new_tokens) for generator in random])
    uniforms_BN = torch.from_numpy(draws).float().to(device)
    results: list[tuple[list[int], list[float]]] = [([], []) for _ in rows]
    # alive: the rows still in the batch; a row that has stopped stays until the next compaction.
    alive, running = list(range(len(rows))), set(range(len(rows)))
    for step in range(sampling.max_new_tokens):
        logits_BV = _step(model, ids_BT, mask_BT, cache)
        tokens_B = _draw(logits_BV, sampling, uniforms_BN[alive, step])
        picked_B = logits_BV.gather(1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(dim=-1)
        sampled = zip(alive, tokens_B.tolist(), picked_B.tolist(), strict=True)
        for place, token, logprob in [s for s in sampled if s[0] in running]:
            results[place][0].append(token)
            results[place][1].append(logprob)
            if token in stop_ids:
                running.discard(place)
                bar.advance(items=1, amount=len(results[place][0]))
        if not running:
            break
        ids_BT, mask_BT = (
            tokens_B[:, None],
            torch.cat([mask_BT, mask_BT.new_ones(len(alive), 1)], 1),
        )
        if len(running) < _COMPACT_BELOW * len(alive):
            keep = torch.tensor(
                [n for n, place in enumerate(alive) if place in running], device=device
            )
            alive = [place for place in alive if place in running]
            cache.batch_select_indices(keep)
            ids_BT, mask_BT = ids_BT[keep], mask_BT[keep]
    bar.advance(items=len(running), amount=sum(len(results[place][0]) for place in running))
    return results
