"""Continuous batching: every step feeds the last token of each running answer and some prompt tokens, as one row.

The slot of a finished answer is given to the next request at once. Prompts are fed in segments beside the
running answers, so there is neither waiting for a batch nor padding.
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
from prefloop.generate.cpu.draws import survey
from prefloop.generate.kv_cache import Slots
from prefloop.records import Sampling

# B rows, V vocabulary, C candidates.

# Numbers of likeliest tokens to consider in turn, for rows where fewer do not decide the draw.
_CANDIDATE_COUNTS = (64, 1024)


class _Candidates(NamedTuple):
    """The likeliest tokens of each row in descending order; of equal logits the lower id first."""

    logits_BC: Tensor
    ids_BC: Tensor
    known_BC: Tensor
    """False for the last tokens of a row, whose logit equals that of tokens that may be left out."""
    all: bool
    """Whether the candidates are the whole vocabulary."""


def draw(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token per row; returns tokens and their log-probs (nats) at temperature 1, both (B,).

    Logits are float32; `uniforms_B` are random numbers in [0, 1).
    """
    if sampling.temperature == 0:
        seen = survey(logits_BV, 1.0, 1)
        if seen is not None:
            return seen.ids_BC[:, 0], seen.logits_BC[:, 0] - seen.total_B
        tokens_B = logits_BV.argmax(dim=-1)
        total_B = logits_BV.logsumexp(dim=-1)
    else:
        tokens_B, total_B = _sample(logits_BV, sampling, uniforms_B)
    return tokens_B, logits_BV.gather(1, tokens_B[:, None])[:, 0] - total_B


def _sample(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens, and each row's log sum exp at temperature 1."""
    tokens_B = torch.empty_like(uniforms_B, dtype=torch.long)
    totals_B = torch.empty_like(uniforms_B)
    rows_B = torch.arange(len(tokens_B), device=tokens_B.device)
    for size in (*_CANDIDATE_COUNTS, logits_BV.shape[1]):
        these_BV = logits_BV[rows_B] if len(rows_B) < len(logits_BV) else logits_BV
        total_B, scaled_B, candidates = _look(these_BV, sampling.temperature, size)
        picked_B, sure_B = _pick_token(candidates, scaled_B, sampling, uniforms_B[rows_B])
        tokens_B[rows_B], totals_B[rows_B] = picked_B, total_B
        rows_B = rows_B[~sure_B]
        if not len(rows_B):
            break
    return tokens_B, totals_B


def _look(logits_BV: Tensor, temperature: float, size: int) -> tuple[Tensor, Tensor, _Candidates]:
    """Log sum exp of the logits, and of them divided by the temperature, both (B,), and the likeliest tokens."""
    seen = survey(logits_BV, temperature, size)
    if seen is not None:
        known_BC = seen.logits_BC > seen.logits_BC[:, -1:]
        candidates = _Candidates(seen.logits_BC, seen.ids_BC, known_BC, all=False)
        return seen.total_B, seen.scaled_B, candidates
    total_B = logits_BV.logsumexp(dim=-1)
    scaled_B = total_B if temperature == 1 else (logits_BV / temperature).logsumexp(dim=-1)
    return total_B, scaled_B, _likeliest(logits_BV, size)


def _likeliest(logits_BV: Tensor, size: int) -> _Candidates:
    if size >= logits_BV.shape[1]:
        values_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        return _Candidates(values_BV, ids_BV, values_BV > -torch.inf, all=True)
    values_BC, ids_BC = logits_BV.topk(size, dim=-1)
    smallest_B1 = values_BC[:, -1:]
    ids_BC, order_BC = ids_BC.sort(dim=-1)
    values_BC, again_BC = values_BC.gather(1, order_BC).sort(dim=-1, descending=True, stable=True)
    return _Candidates(values_BC, ids_BC.gather(1, again_BC), values_BC > smallest_B1, all=False)


def _pick_token(
    candidates: _Candidates, total_B: Tensor, sampling: Sampling, uniforms_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The token drawn by each uniform number, and whether the whole vocabulary would give the same."""
    scaled_BC = candidates.logits_BC / sampling.temperature
    allowed_BC = candidates.known_BC.clone()
    if sampling.top_k:
        # With top_k only the k likeliest tokens count towards the probability mass.
        allowed_BC[:, sampling.top_k :] = False
        total_B = scaled_BC.masked_fill(~allowed_BC, -torch.inf).logsumexp(dim=-1)
    probs_BC = (scaled_BC - total_B[:, None]).exp() * allowed_BC
    cumulative_BC = probs_BC.cumsum(dim=-1)
    if sampling.top_p < 1:
        allowed_BC &= cumulative_BC - probs_BC < sampling.top_p
    if sampling.min_p:
        allowed_BC &= probs_BC >= sampling.min_p * probs_BC[:, :1]
    count_B1 = allowed_BC.sum(dim=-1, keepdim=True).clamp(min=1)
    truncated = bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)
    mass_B1 = cumulative_BC.gather(1, count_B1 - 1) if truncated or candidates.all else 1.0
    index_B1 = (cumulative_BC <= uniforms_B[:, None] * mass_B1).sum(dim=-1, keepdim=True)
    # A uniform number that rounds to 1 is past the end: take the last allowed token.
    tokens_B = candidates.ids_BC.gather(1, index_B1.minimum(count_B1 - 1))[:, 0]
    known_B1 = candidates.known_BC.sum(dim=-1, keepdim=True)
    # Undecided where truncation, or the drawn token, may lie beyond the known candidates.
    decided_B1 = (
        known_B1 >= sampling.top_k
        if sampling.top_k
        else known_B1 > (count_B1 if truncated else index_B1)
    )
    return tokens_B, decided_B1[:, 0] | candidates.all


# N tokens of a step, E rows whose next token is drawn, V vocabulary.

# With more tokens per step, matrix products become hardly faster, and running answers wait longer.
STEP_TOKENS = 512

# A request waits for another conversation's prefix if that saves at least this many tokens.
WORTH_WAITING = 16


class Sampled(NamedTuple):
    """One sampled answer as token ids, with log-probs."""

    ids: list[int]
    logprobs: list[float]
    """Log-prob in nats of each token, at temperature 1."""


class Task(NamedTuple):
    """A prompt to continue, with the random numbers of its draws."""

    prompt: list[int]
    uniforms: np.ndarray
    """One random number in [0, 1) for each token that may be drawn."""


@dataclass
class _Row:
    task_index: int
    tokens: list[int]
    slot: int
    present: int
    """Number of tokens whose keys and values are computed."""
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
    """Continue every task until `ended(new tokens)` is true or `max_new_tokens` is reached.

    `finished(task's index, answer)` is called for each answer as it ends.
    """
    waiting = deque(
        sorted(range(len(tasks)), key=lambda task_index: -len(tasks[task_index].prompt))
    )
    running: list[_Row] = []
    while waiting or running:
        _admit(slots, tasks, waiting, running)
        fed = _feed(running)
        drawing = [row for row, count in fed if count == row.pending]
        logits_EV = _forward(model, slots, fed)
        if not drawing:
            continue
        uniforms_E = torch.tensor(
            [tasks[row.task_index].uniforms[len(row.sampled.ids)] for row in drawing],
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
                finished(row.task_index, row.sampled)
            else:
                row.tokens.append(token)
                slots.follow(row.slot, token)


def _admit(slots: Slots, tasks: Sequence[Task], waiting: deque[int], running: list[_Row]) -> None:
    """Assign free slots to waiting tasks.

    A task that can soon copy what another is computing is passed by, with a free slot left for it: several samples
    of a prompt start side by side, and the prompt is computed once.
    """
    free = set(range(slots.count)) - {row.slot for row in running}
    later: list[int] = []
    while waiting and len(free) > len(later):
        task_index = waiting.popleft()
        prompt = tasks[task_index].prompt
        match = slots.find(prompt, free)
        if match.coming >= match.shared + WORTH_WAITING:
            later.append(task_index)
            continue
        slots.begin(match, prompt)
        free.remove(match.slot)
        running.append(_Row(task_index, list(prompt), match.slot, match.shared))
    waiting.extendleft(reversed(later))


def _feed(running: Sequence[_Row]) -> list[tuple[_Row, int]]:
    """Rows with the number of their tokens to feed in this step: single tokens by slot, then segments.

    A prompt that fits into one step is not divided.
    """
    single = [row for row in running if row.pending == 1]
    fed = [(row, 1) for row in sorted(single, key=lambda row: row.slot)]
    budget = STEP_TOKENS
    for row in running:
        count = min(row.pending, STEP_TOKENS)
        if row.pending > 1 and count <= budget:
            fed.append((row, count))
            budget -= count
    return fed


def _forward(model: Any, slots: Slots, fed: Sequence[tuple[_Row, int]]) -> Tensor:
    """Feed tokens; returns float32 logits (E, V) of each row whose tokens are now all computed."""
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
        slots.computed(row.slot, row.present, tiled=count > 1)
    return logits_EV


def feed(model: Any, ids: Sequence[int], ends: Sequence[int], step: Step) -> Tensor:
    """One forward pass over a step's tokens; returns float32 logits (E, V) at the indices `ends`."""
    output = model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=step.positions_N[None],
        use_cache=False,
        logits_to_keep=torch.tensor(ends, dtype=torch.long, device=model.device),
        step=step,
    )
    logits_EV: Tensor = output.logits[0].float()
    return logits_EV
