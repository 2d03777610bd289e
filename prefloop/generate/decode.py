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
from prefloop.generate.sampler import draw
from prefloop.records import Sampling

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
