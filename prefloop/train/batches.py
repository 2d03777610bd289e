"""Records into token groups: what the trainer sees, whatever the method."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from prefloop.chat import Chat
from prefloop.errors import TrainingError
from prefloop.records import Pair
from prefloop.seeds import derive_seed
from prefloop.train.packing import TokenGroup


class Example(NamedTuple):
    """One prompt with the responses that the loss compares, in the order of the method's roles."""

    id: str
    group: TokenGroup
    margin: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of every response, shared ones counted once for the prompt only."""
        return len(self.group.prompt) + sum(map(len, self.group.completions))


def encode_pairs(
    chat: Chat, pairs: Sequence[Pair], roles: Sequence[str], window: int | None
) -> list[Example]:
    """Tokenise pairs; a completion is the answer and its end-of-turn token.

    Raises TrainingError for a pair longer than `window`, the model's context length in tokens.
    """
    examples = []
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
        examples.append(Example(pair.id, group, pair.margin))
    return examples


def _completion(chat: Chat, pair: Pair, role: str) -> tuple[int, ...]:
    # An answer that was cut off never ended its turn, so training must not say that it did.
    encode = chat.text_ids if role in pair.unfinished else chat.answer_ids
    return tuple(encode(getattr(pair, role)))


def schedule(count: int, *, epochs: int, batch_size: int, seed: int) -> list[list[int]]:
    """Indices of each optimiser step's examples: every epoch in an order of its own, the last step shorter."""
    steps = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
        steps += [order[start : start + batch_size] for start in range(0, count, batch_size)]
    return steps
