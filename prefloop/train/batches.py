"""Records into token groups: what the trainer sees, whatever the method."""

from __future__ import annotations

import json
import math
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prefloop.errors import TrainingError
from prefloop.models.chat import Chat
from prefloop.records import Pair, derive_seed
from prefloop.train.packing import TokenGroup, build_tree

if TYPE_CHECKING:
    from prefloop.train.options import TrainOptions


# bf16 log-probs of a few hundred tokens carry about this much noise once multiplied by beta = 0.1.
_START_TOLERANCE = 0.1


def check_finite(
    folder: Path,
    ids: Sequence[str],
    loss_B: Tensor,
    numbers: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Raise TrainingError where a loss is not finite; its example's (B,) `numbers` are left in `folder`."""
    bad = [n for n, finite in enumerate(torch.isfinite(loss_B).tolist()) if not finite]
    if not bad:
        return
    path = folder / "nonfinite.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in bad:
            row = {"pair": ids[n], "loss": loss_B[n].item()}
            found = {of: {r: v[n].item() for r, v in by.items()} for of, by in numbers.items()}
            file.write(json.dumps({**row, **found}) + "\n")
    names = ", ".join(ids[n] for n in bad)
    raise TrainingError(
        f"the loss of {names} is not finite (their log-probs are in {path}); "
        "lower train.lr or remove these prompts"
    )


def check_initial_loss(folder: Path, expected: float | None, loss: float) -> None:
    """Raise TrainingError where the first step's loss is not the `expected` one; None expects nothing."""
    if expected is not None and abs(loss - expected) > _START_TOLERANCE * max(1.0, abs(expected)):
        raise TrainingError(
            f"the first loss is {loss:.4f} where the log-probs kept in {folder} give {expected:.4f}; "
            "they are not of this policy, delete that folder to compute them again"
        )


class Example(NamedTuple):
    """One prompt with the responses that the loss compares, in the order of the method's roles."""

    id: str
    group: TokenGroup
    margin: float = 0.0
    score: float = 0.0
    """The judge's score of the first role's response; 0 where no judge gave one."""
    smoothing: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of every response, shared ones counted once for the prompt only."""
        return len(self.group.prompt) + sum(map(len, self.group.completions))


class Pass(NamedTuple):
    """One forward and backward pass of one process."""

    indices: list[int]
    counts: bool
    """False where it only keeps company with other processes' passes."""


def encode_pairs(
    chat: Chat, pairs: Iterable[Pair], roles: Sequence[str], window: int | None
) -> Iterator[Example]:
    """Pairs as tokens, one by one: the sampled ones where a policy wrote the answer, else the text's and its end of turn.

    Raises TrainingError for a pair longer than `window`, the model's context length in tokens.
    """
    for pair in pairs:
        group = TokenGroup(
            prompt=tuple(chat.prompt_ids(pair.prompt)),
            completions=tuple(_completion(chat, pair, role) for role in roles),
        )
        if window is not None and group.longest > window:
            raise TrainingError(
                f"pair {pair.id} has {group.longest} tokens and the model's window {window}; "
                "lower data.max_prompt_tokens or method.sampling.max_new_tokens"
            )
        score = pair.scores.get(roles[0], 0.0)
        yield Example(pair.id, group, pair.margin, score, pair.smoothing)


def _completion(chat: Chat, pair: Pair, role: str) -> tuple[int, ...]:
    answer = pair.answer(role)
    # An answer that was cut off never ended its turn, so training must not say that it did.
    ended = answer.finish == "stop"
    return answer.token_ids or tuple(chat.completion_ids(pair.prompt, answer.text, ended=ended))


def schedule(count: int, *, epochs: int, batch_size: int, seed: int) -> list[Sequence[int]]:
    """Indices of each optimiser step's examples: every epoch in an order of its own, the last step shorter.

    An index takes eight bytes.
    """
    steps: list[Sequence[int]] = []
    for epoch in range(epochs):
        order = array("Q", range(count))
        random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
        steps += [order[start : start + batch_size] for start in range(0, count, batch_size)]
    return steps


def learning_rate(options: TrainOptions, progress: float) -> float:
    """Learning rate at `progress` in (0, 1) of the schedule: warm-up from 0, then line, cosine or constant."""
    if progress < options.warmup:
        return options.lr * progress / options.warmup
    rest = (1 - progress) / (1 - options.warmup)
    factors = {"linear": rest, "cosine": 0.5 - 0.5 * math.cos(math.pi * rest), "constant": 1.0}
    return options.lr * factors[options.schedule]


def shares(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Places of `sizes` divided among ranks, in ascending order: as even in size as longest-first makes them."""
    loads = [0] * ranks
    owner = [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        rank = loads.index(min(loads))
        owner[place] = rank
        loads[rank] += sizes[place]
    return [[place for place, owned in enumerate(owner) if owned == rank] for rank in range(ranks)]


def plan(
    examples: Sequence[Example],
    chosen: Sequence[int],
    *,
    ranks: int,
    size: int,
    one_row_of: int | None = None,
) -> list[list[Pass]]:
    """By rank, the passes that compute the examples `chosen`, at most `size` of them in each.

    `one_row_of`: for sharded weights, whose passes must be of one row (of so many tokens, if packed) and
    as many on each rank: a rank with less to do repeats the shortest example, which counts nothing.
    """
    split = shares([examples[index].tokens for index in chosen], ranks)
    mine = [[chosen[place] for place in share] for share in split]
    if one_row_of is None:
        return [
            [Pass(own[start : start + size], True) for start in range(0, len(own), size)]
            for own in mine
        ]
    rows = [_single_rows(examples, own, size=size, token_budget=one_row_of) for own in mine]
    idle = Pass([min(chosen, key=lambda index: examples[index].tokens)], False)
    longest = max(map(len, rows))
    return [[Pass(row, True) for row in own] + [idle] * (longest - len(own)) for own in rows]


def _single_rows(
    examples: Sequence[Example], indices: Sequence[int], *, size: int, token_budget: int
) -> list[list[int]]:
    """Indices in micro-batches of at most `size` examples that each pack into one row."""
    batches: list[list[int]] = []
    room = 0
    for index in indices:
        tokens = build_tree(examples[index].group).size
        if not batches or len(batches[-1]) == size or tokens > room:
            batches.append([])
            room = token_budget
        batches[-1].append(index)
        room -= tokens
    return batches
