"""The attention of a step: tokens of many conversations in one row, without padding.

Linear layers need not know whose tokens a row holds; attention does, so a function of ours is handed to
the model through transformers' attention interface, with a `Step` that says so.

No result depends on a conversation's mates, not even in its last bit: what is summed is always cut at the
same places of the conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from prefloop.generate.kv_cache import TILE, Slots

# N tokens of a step, P slots of a group, H query heads, K key/value heads, G query heads for each of
# those, T positions read, D head dimension, Q queries of a tile.

ATTENTION = "prefloop_slots"
# Positions are read in multiples of this: the last bits of a product can depend on odd lengths.
_ROUND = 32
# What a further group costs, in key/value positions that could have been read in its time.
_GROUP_COST = 400


class Segment(NamedTuple):
    """Several tokens of one conversation."""

    slot: int
    begin: int
    """Place of the first among the step's tokens."""
    length: int
    start: int
    """Position of the first in its conversation."""


class Group(NamedTuple):
    """Neighbouring slots with one token each in the step, read together."""

    rows: slice
    slots: slice
    length: int


@dataclass
class Step:
    """Whose tokens a step feeds: first those alone in their conversation, by slot, then segments."""

    slots: Slots
    slots_N: Tensor
    positions_N: Tensor
    groups: list[Group]
    segments: list[Segment]
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    @staticmethod
    def plan(slots: Slots, feeds: Sequence[tuple[int, int, int]], device: torch.device) -> Step:
        """`feeds`: (slot, position of the first token, number of tokens), single tokens first and by slot."""
        slot_N = np.repeat([slot for slot, _, _ in feeds], [count for _, _, count in feeds])
        position_N = np.concatenate([np.arange(p, p + n) for _, p, n in feeds])
        singles = [(slot, position) for slot, position, count in feeds if count == 1]
        segments, begin = [], len(singles)
        for slot, position, count in feeds[len(singles) :]:
            segments.append(Segment(slot, begin, count, position))
            begin += count
        return Step(
            slots=slots,
            slots_N=torch.from_numpy(slot_N).to(device),
            positions_N=torch.from_numpy(position_N).to(device),
            groups=_group(singles),
            segments=segments,
        )

    def mask(self, number: int, window: int | None) -> Tensor | None:
        """(P, 1, 1, T), added to a group's scores; None where every row sees all positions read."""
        if (number, window) not in self._masks:
            group = self.groups[number]
            seen_PT = _seen(self.positions_N[group.rows], group.length, window)
            self._masks[number, window] = None if seen_PT.all() else _added(seen_PT)[:, None, None]
        return self._masks[number, window]


def _seen(queries: Tensor, length: int, window: int | None) -> Tensor:
    """Which of `length` positions the queries' positions see, (queries, length)."""
    keys_T = torch.arange(length, device=queries.device)
    seen = keys_T <= queries[:, None]
    if window is not None:
        seen &= keys_T > queries[:, None] - window
    return seen


def _added(seen: Tensor) -> Tensor:
    added = torch.zeros(seen.shape, device=seen.device)
    return added.masked_fill_(~seen, torch.finfo(torch.float32).min)


def _group(singles: Sequence[tuple[int, int]]) -> list[Group]:
    """Runs of neighbouring slots, cut where reading up to the longest one's length would waste more than a cut costs."""
    groups: list[Group] = []
    first, longest, total = 0, 0, 0
    for row, (slot, position) in enumerate(singles):
        length = position + 1
        wide, size = max(longest, length), row - first + 1
        joined = wide * size - (total + length)
        apart = longest * (size - 1) - total
        neighbour = row > first and slot == singles[row - 1][0] + 1
        if row > first and not (neighbour and joined <= apart + _GROUP_COST):
            groups.append(_run(singles, first, row, longest))
            first, longest, total = row, 0, 0
        longest, total = max(longest, length), total + length
    if singles:
        groups.append(_run(singles, first, len(singles), longest))
    return groups


def _run(singles: Sequence[tuple[int, int]], first: int, end: int, length: int) -> Group:
    slots = slice(singles[first][0], singles[end - 1][0] + 1)
    return Group(slice(first, end), slots, -(-length // _ROUND) * _ROUND)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: Step,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a step's tokens: query (1, H, N, D), key and value (1, K, N, D); gives (1, N, H, D)."""
    layer, window = module.layer_idx, options.get("sliding_window")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    step.slots.write(layer, (key[0], value[0]), (step.slots_N, step.positions_N))
    query_NHD = (query[0] * scale).transpose(0, 1)
    parts = [_single(step, number, layer, query_NHD, window) for number in range(len(step.groups))]
    parts += [_several(step, segment, layer, query_NHD, window) for segment in step.segments]
    return torch.cat(parts)[None], None


def _single(step: Step, number: int, layer: int, query_NHD: Tensor, window: int | None) -> Tensor:
    """One new token for each slot of a group, without repeating keys for grouped queries; (P, H, D)."""
    group = step.groups[number]
    keys_PKTD, values_PKTD = step.slots.read(layer, group.slots, group.length)
    P, K = keys_PKTD.shape[:2]
    query_PKGD = query_NHD[group.rows].reshape(P, K, -1, query_NHD.shape[2])
    G = query_PKGD.shape[2]
    if G > 1 and G % 2:
        # Products of three rows took half as long again as those of four.
        query_PKGD = functional.pad(query_PKGD, (0, 0, 0, 1))
    scores_PKGT = torch.matmul(query_PKGD, keys_PKTD.transpose(2, 3)).float()
    mask_P11T = step.mask(number, window)
    if mask_P11T is not None:
        scores_PKGT += mask_P11T
    weights_PKGT = scores_PKGT.softmax(dim=-1).to(values_PKTD.dtype)
    return torch.matmul(weights_PKGT, values_PKTD)[:, :, :G].flatten(1, 2)


def _several(
    step: Step, segment: Segment, layer: int, query_NHD: Tensor, window: int | None
) -> Tensor:
    """A segment's tokens after all that its slot holds before them; (length, H, D).

    Tiles lie at fixed positions of the conversation and are always computed whole, however its prompt
    was cut into segments.
    """
    _, H, D = query_NHD.shape
    end = segment.start + segment.length
    whole = slice(segment.slot, segment.slot + 1)
    parts = []
    for tile in range(segment.start // TILE, -(-end // TILE)):
        start, stop = tile * TILE, (tile + 1) * TILE
        first, last = max(segment.start, start), min(end, stop)
        begin = segment.begin - segment.start + first
        query_HQD = query_NHD.new_zeros(H, TILE, D)
        query_HQD[:, first - start : last - start] = query_NHD[
            begin : begin + last - first
        ].transpose(0, 1)
        keys, values = step.slots.read(layer, whole, stop)
        keys_KTD, values_KTD = keys[0], values[0]
        K = len(keys_KTD)
        scores = torch.matmul(query_HQD.view(K, -1, D), keys_KTD.transpose(1, 2)).float()
        scores_KGQT = scores.view(K, -1, TILE, stop)
        scores_KGQT += _tile_mask(tile, window, scores.device)
        weights = scores.softmax(dim=-1).to(values_KTD.dtype)
        out_HQD = torch.matmul(weights, values_KTD).view(H, TILE, -1)
        parts.append(out_HQD[:, first - start : last - start].transpose(0, 1))
    return torch.cat(parts)


@lru_cache(maxsize=256)
def _tile_mask(tile: int, window: int | None, device: torch.device) -> Tensor:
    """(Q, T), added to the scores of a tile's queries over all positions up to its end."""
    queries_Q = torch.arange(tile * TILE, (tile + 1) * TILE, device=device)
    return _added(_seen(queries_Q, (tile + 1) * TILE, window))


AttentionInterface.register(ATTENTION, _attend)


def slot_attention(model: Any) -> AbstractContextManager[None]:
    """Inside, the model's layers attend through slots, and its forward pass takes a `step`."""
    return attending(model, ATTENTION)


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[None]:
    """Inside, the model's layers attend in another of transformers' ways."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before
