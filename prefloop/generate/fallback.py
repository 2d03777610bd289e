"""transformers' own `generate`, for models that the decode loop cannot serve; our draws, its caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from prefloop.generate.decode import Sampled, Task
from prefloop.generate.sampler import draw
from prefloop.records import Sampling

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
