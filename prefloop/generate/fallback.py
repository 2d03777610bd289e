"""transformers' own `generate`, for models that the decode loop cannot serve; our draws, its caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from prefloop.generate.cache_attention import Step, attending, slot_attention
from prefloop.generate.decode import Sampled, Task, draw, feed
from prefloop.generate.kv_cache import Slots
from prefloop.machine import is_out_of_memory
from prefloop.records import Sampling

# E places whose logits are compared, V vocabulary.

# Largest difference of a logit, in standard deviations of all.
_TOLERANCE = 1e-3

# Half precision rounds each step, some models much more than others; beyond the second number it is no rounding.
_TOLERANCE_HALF, _MOST_HALF = 0.1, 0.5

# There, so many pairs of conversations before a model is refused: what rounding does to one of them is chance.
_ATTEMPTS = 4

# What models raise that cannot be asked in another way than their own.
_REFUSALS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def slot_decoding_unsupported(model: Any, longest: int) -> str | None:
    """Why conversations of `longest` tokens cannot be decoded in slots; None where they can.

    Two short conversations go through slots and through the model's own forward pass. Where the model
    has a window that `longest` exceeds, one of them exceeds it too.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation!r}"
    if any(longest > limit for limit in _stretched_beyond(config)):
        return "its rotary embedding turns every token by the length of the longest conversation"
    length = max([9, *(window + 3 for window in windows_of(model) if window < longest)])
    worst, tolerance = [], []
    for attempt in range(1 if _is_exact(model) else _ATTEMPTS):
        first = attempt * length
        rows = [
            [(7919 * n + 3) % config.vocab_size for n in range(first, first + size)]
            for size in (5, length)
        ]
        try:
            found_EV = _in_slots(model, rows)
            expected_EV = _plainly(model, rows)
        except _REFUSALS as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            return f"it refuses ({type(error).__name__}: {str(error).splitlines()[0]})"
        if found_EV.shape != expected_EV.shape:
            return "its logits have another shape"
        worst.append(_apart(found_EV, expected_EV))
        tolerance.append(_tolerance(model, rows, expected_EV))
        if fmean(worst) <= fmean(tolerance):
            return None
    return f"its logits differ by {fmean(worst):.2g} standard deviations"


def _is_exact(model: Any) -> bool:
    return model.dtype in (torch.float32, torch.float64)


def _apart(found_EV: Tensor, expected_EV: Tensor) -> float:
    return float((found_EV - expected_EV).abs().max() / expected_EV.std().clamp(min=1e-6))


def _tolerance(model: Any, rows: list[list[int]], expected_EV: Tensor) -> float:
    """In half precision as much as two of the model's own ways to attend, which round differently, are apart."""
    if _is_exact(model):
        return _TOLERANCE
    try:
        with attending(model, "eager"):
            apart = _apart(_plainly(model, rows), expected_EV)
    except _REFUSALS as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return _TOLERANCE_HALF
    return min(max(_TOLERANCE_HALF, 1.5 * apart), _MOST_HALF)


def windows_of(model: Any) -> list[int]:
    """Numbers of tokens beyond which some layers no longer see everything, or turn tokens otherwise."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return [*(int(window) for window in found if window), *_stretched_beyond(config)]


def _stretched_beyond(config: Any) -> list[int]:
    """Numbers of tokens beyond which transformers changes a rotary embedding's frequencies, of all rows at once."""
    ropes = getattr(config, "rope_parameters", None) or {}
    by_layer = [rope for rope in ropes.values() if isinstance(rope, dict)]
    limits = []
    for rope in by_layer or [ropes]:
        kind = str(rope.get("rope_type"))
        if "dynamic" in kind:
            limits.append(config.max_position_embeddings)
        elif kind == "longrope":
            limits.append(rope["original_max_position_embeddings"])
    return limits


def reads_padding(model: Any) -> bool:
    """Whether a row's logits stay the same beside a longer one, padded on the left: some models see no mask.

    Asked of `generate` itself, at its first token and at one that comes out of the cache, since some see the mask
    at the first alone. Where a rotary embedding goes by the longest row the mask is no help.
    """
    config = model.config.get_text_config()
    if _stretched_beyond(config):
        return False
    rows = [[(7919 * n + 3) % config.vocab_size for n in range(size)] for size in (5, 9)]
    ids_BT = torch.tensor([[0] * (9 - len(row)) + row for row in rows], device=model.device)
    mask_BT = torch.tensor(
        [[0] * (9 - len(row)) + [1] * len(row) for row in rows], device=model.device
    )
    with _plain_settings(model):
        output = model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    new_BT = output.sequences[:, 9:].tolist()
    for place, found_EV in enumerate(output.logits):
        so_far = [row + new[:place] for row, new in zip(rows, new_BT, strict=True)]
        expected_EV = _plainly(model, so_far)
        most = max(100 * _TOLERANCE, _tolerance(model, so_far, expected_EV))
        if not _apart(found_EV.float(), expected_EV) <= most:
            return False
    return True


def _in_slots(model: Any, rows: list[list[int]]) -> Tensor:
    """All but the last token of each row in one step, the last ones in the next."""
    slots = Slots(len(rows), max(map(len, rows)))
    with slot_attention(model):
        begun = [(slot, 0, len(row) - 1) for slot, row in enumerate(rows)]
        ids = [token for row in rows for token in row[:-1]]
        feed(model, ids, [], Step.plan(slots, begun, model.device))
        ended = [(slot, len(row) - 1, 1) for slot, row in enumerate(rows)]
        step = Step.plan(slots, ended, model.device)
        return feed(model, [row[-1] for row in rows], list(range(len(rows))), step)


def _plainly(model: Any, rows: list[list[int]]) -> Tensor:
    logits = [
        model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -1]
        for row in rows
    ]
    return torch.stack(logits).float()


# B rows, T positions, V vocabulary.


class _Draw(LogitsProcessor):
    """Leaves only the token drawn by our sampler, with each request's own random numbers."""

    def __init__(self, tasks: Sequence[Task], sampling: Sampling) -> None:
        self._uniforms_BT = torch.from_numpy(np.stack([task.uniforms for task in tasks])).float()
        self._sampling = sampling
        self.logprobs_TB: list[list[float]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniforms_B = self._uniforms_BT[:, len(self.logprobs_TB)].to(scores.device)
        tokens_B, logprobs_B = draw(scores.float(), self._sampling, uniforms_B)
        self.logprobs_TB.append(logprobs_B.tolist())
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Tells `generate` which rows have ended."""

    def __init__(self, start: int, ended: Callable[[list[int]], bool]) -> None:
        self._start, self._ended = start, ended
        self._done: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new = input_ids[:, self._start :].tolist()
        before = self._done or [False] * len(new)
        self._done = [b or self._ended(ids) for b, ids in zip(before, new, strict=True)]
        return torch.tensor(self._done, device=input_ids.device)


def generate(
    model: Any,
    tasks: Sequence[Task],
    sampling: Sampling,
    ended: Callable[[list[int]], bool],
    padded: tuple[Tensor, Tensor],
) -> list[Sampled]:
    """Continue one batch; `padded` are the prompts' ids and mask (B, T), padded on the left."""
    ids_BT, mask_BT = padded
    drawn = _Draw(tasks, sampling)
    with _plain_settings(model):
        out_BT = model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            logits_processor=[drawn],
            stopping_criteria=[_Ended(ids_BT.shape[1], ended)],
        )
    rows = []
    for number, new in enumerate(out_BT[:, ids_BT.shape[1] :].tolist()):
        ids = next((new[:n] for n in range(1, len(new)) if ended(new[:n])), new)
        rows.append(Sampled(ids, [row[number] for row in drawn.logprobs_TB[: len(ids)]]))
    return rows


@contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Without what a model's folder sets for `generate`: penalties, bans and stop tokens of its own."""
    before = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = before
