"""The decode loop: every step feeds each running answer's last token and some prompt tokens, as one row.

An answer that ends leaves its slot to the next request at once. Prompts are fed in segments beside the
running answers, so nothing waits for a batch and nothing is padded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefloop.generate.cache_attention import Step
from prefloop.generate.kv_cache import Slots
from prefloop.records import Sampling

# B rows, V vocabulary, C candidates.

# How many of the likeliest tokens are looked at, for rows that fewer do not decide.
_SIZES = (64, 1024)


class _Candidates(NamedTuple):
    """The likeliest tokens of each row in descending order, of equal ones the lower id first."""

    logits_BC: Tensor
    ids_BC: Tensor
    known_BC: Tensor
    """False at the end of a row, where another token with the same logit may have been left out."""
    all: bool
    """Whether these are all tokens."""


def draw(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability (nats) at temperature 1, both (B,); logits are float32."""
    total_B = logits_BV.logsumexp(dim=-1)
    tokens_B = _sample(logits_BV, total_B, sampling, uniforms_B)
    return tokens_B, logits_BV.gather(1, tokens_B[:, None])[:, 0] - total_B


def _sample(logits_BV: Tensor, total_B: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    if sampling.temperature != 1:
        total_B = (logits_BV / sampling.temperature).logsumexp(dim=-1)
    tokens_B = torch.empty_like(uniforms_B, dtype=torch.long)
    rows_B = torch.arange(len(tokens_B), device=tokens_B.device)
    for size in (*_SIZES, logits_BV.shape[1]):
        found = _likeliest(logits_BV[rows_B] if len(rows_B) < len(logits_BV) else logits_BV, size)
        picked_B, sure_B = _pick(found, total_B[rows_B], sampling, uniforms_B[rows_B])
        tokens_B[rows_B] = picked_B
        rows_B = rows_B[~sure_B]
        if not len(rows_B):
            break
    return tokens_B


def _likeliest(logits_BV: Tensor, size: int) -> _Candidates:
    if size >= logits_BV.shape[1]:
        values_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        return _Candidates(values_BV, ids_BV, values_BV > -torch.inf, all=True)
    values_BC, ids_BC = logits_BV.topk(size, dim=-1)
    floor_B1 = values_BC[:, -1:]
    ids_BC, order_BC = ids_BC.sort(dim=-1)
    values_BC, again_BC = values_BC.gather(1, order_BC).sort(dim=-1, descending=True, stable=True)
    return _Candidates(values_BC, ids_BC.gather(1, again_BC), values_BC > floor_B1, all=False)


def _pick(
    found: _Candidates, total_B: Tensor, sampling: Sampling, uniforms_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The token at each uniform number, and whether it would be the same among all tokens."""
    hot_BC = found.logits_BC / sampling.temperature
    kept_BC = found.known_BC.clone()
    if sampling.top_k:
        # Among the k likeliest only these count towards the mass.
        kept_BC[:, sampling.top_k :] = False
        total_B = hot_BC.masked_fill(~kept_BC, -torch.inf).logsumexp(dim=-1)
    probs_BC = (hot_BC - total_B[:, None]).exp() * kept_BC
    up_to_BC = probs_BC.cumsum(dim=-1)
    if sampling.top_p < 1:
        kept_BC &= up_to_BC - probs_BC < sampling.top_p
    if sampling.min_p:
        kept_BC &= probs_BC >= sampling.min_p * probs_BC[:, :1]
    count_B1 = kept_BC.sum(dim=-1, keepdim=True).clamp(min=1)
    truncated = bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)
    mass_B1 = up_to_BC.gather(1, count_B1 - 1) if truncated or found.all else 1.0
    place_B1 = (up_to_BC <= uniforms_B[:, None] * mass_B1).sum(dim=-1, keepdim=True)
    # A uniform number that rounds to 1 falls off the end; the last token that is kept stands in.
    tokens_B = found.ids_BC.gather(1, place_B1.minimum(count_B1 - 1))[:, 0]
    known_B1 = found.known_BC.sum(dim=-1, keepdim=True)
    # Undecided: truncation may go on beyond what is known, or the place lies there.
    ends_B1 = (
        known_B1 >= sampling.top_k
        if sampling.top_k
        else known_B1 > (count_B1 if truncated else place_B1)
    )
    return tokens_B, ends_B1[:, 0] | found.all


# N tokens of a step, E rows whose next token is drawn, V vocabulary.

# More tokens a step make matrix products hardly faster and running answers wait longer.
STEP_TOKENS = 512

# Starting from what another conversation computed is worth waiting a step for from this many tokens on.
WORTH_WAITING = 16


class Sampled(NamedTuple):
    """One answer in tokens."""

    ids: list[int]
    logprobs: list[float]
    """Of each token, at temperature 1."""


class Task(NamedTuple):
    """What to continue and how to draw."""

    prompt: list[int]
    uniforms: np.ndarray
    """One number in [0, 1) for each token that may be drawn."""


@dataclass
class _Row:
    place: int
    tokens: list[int]
    slot: int
    present: int
    """How many of the tokens have keys and values."""
    sampled: Sampled = field(default_factory=lambda: Sampled([], []))

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.present


def decode(
    model: Any,
    slots: Slots,
    tasks: Sequence[Task],
    sampling: Sampling,
    ended: Callable[[list[int]], bool],
    finished: Callable[[int, Sampled], None],
) -> None:
    """Continue every task until `ended(new tokens)` or the limit; `finished` is told each place and answer."""
    waiting = deque(sorted(range(len(tasks)), key=lambda place: -len(tasks[place].prompt)))
    running: list[_Row] = []
    while waiting or running:
        _admit(slots, tasks, waiting, running)
        fed = _feed(running)
        drawing = [row for row, count in fed if count == row.pending]
        logits_EV = _forward(model, slots, fed)
        if not drawing:
            continue
        uniforms_E = torch.tensor(
            [tasks[row.place].uniforms[len(row.sampled.ids)] for row in drawing],
            dtype=torch.float32,
            device=logits_EV.device,
        )
        tokens_E, logprobs_E = draw(logits_EV, sampling, uniforms_E)
        for row, token, logprob in zip(
            drawing, tokens_E.tolist(), logprobs_E.tolist(), strict=True
        ):
            row.sampled.ids.append(token)
            row.sampled.logprobs.append(logprob)
            if len(row.sampled.ids) == sampling.max_new_tokens or ended(row.sampled.ids):
                running.remove(row)
                finished(row.place, row.sampled)
            else:
                row.tokens.append(token)
                slots.follow(row.slot, token)


def _admit(slots: Slots, tasks: Sequence[Task], waiting: deque[int], running: list[_Row]) -> None:
    """Give free slots to waiting requests."""
    free = set(range(slots.count)) - {row.slot for row in running}
    while waiting and free:
        prompt = tasks[waiting[0]].prompt
        found = slots.find(prompt, free)
        if found.coming >= found.shared + WORTH_WAITING:
            break
        slots.begin(found, prompt)
        free.remove(found.slot)
        running.append(_Row(waiting.popleft(), list(prompt), found.slot, found.shared))


def _feed(running: Sequence[_Row]) -> list[tuple[_Row, int]]:
    """Rows and how many of their tokens this step feeds: single tokens by slot, then segments.

    A prompt that fits into a step is not cut.
    """
    single = [row for row in running if row.pending == 1]
    fed = [(row, 1) for row in sorted(single, key=lambda row: row.slot)]
    room = STEP_TOKENS
    for row in running:
        count = min(row.pending, STEP_TOKENS)
        if row.pending > 1 and count <= room:
            fed.append((row, count))
            room -= count
    return fed


def _forward(model: Any, slots: Slots, fed: Sequence[tuple[_Row, int]]) -> Tensor:
    """Feed tokens; logits (E, V), float32, after each row that is now wholly present."""
    ids: list[int] = []
    ends: list[int] = []
    for row, count in fed:
        ids += row.tokens[row.present : row.present + count]
        if count == row.pending:
            ends.append(len(ids) - 1)
    step = Step.plan(slots, [(row.slot, row.present, count) for row, count in fed], model.device)
    logits_EV = feed(model, ids, ends, step)
    for row, count in fed:
        row.present += count
        slots.computed(row.slot, row.present)
    return logits_EV


def feed(model: Any, ids: Sequence[int], ends: Sequence[int], step: Step) -> Tensor:
    """One forward pass over a step's tokens; logits (E, V), float32, at the places `ends`."""
    output = model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=step.positions_N[None],
        use_cache=False,
        logits_to_keep=torch.tensor(ends, dtype=torch.long, device=model.device),
        step=step,
    )
    logits_EV: Tensor = output.logits[0].float()
    return logits_EV
