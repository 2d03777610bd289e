"""Keys and values of conversations, a slot each, and the attention that reads and writes them.

A step feeds tokens of many conversations to the model as one row without padding. Linear layers need not
know; attention does, so an attention function of ours is handed to the model through transformers'
attention interface, with a `Step` that says whose tokens these are. A conversation that has ended stays in
its slot until the slot is needed: one that begins with the same tokens starts from its keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

# S slots, N tokens of a step, R of them alone in their conversation, P slots of a group, H query heads,
# K key/value heads, G query heads for each of those, C positions of a slot, T positions read, D head dimension,
# Q queries of a tile.

ATTENTION = "prefloop_slots"
# Queries of several tokens are computed so many at a time.
TILE = 64
# Positions are read in multiples of this: the last bits of a product can depend on odd lengths.
_ROUND = 16
# What a further group costs, in key/value positions that could have been read in its time.
_GROUP_COST = 400


class Found(NamedTuple):
    """Where a conversation goes."""

    slot: int
    source: int
    """The slot whose conversation begins with the same tokens."""
    shared: int
    """How many of them have keys and values."""
    coming: int
    """How many will have once the running prompts are fed."""


class Slots:
    """Keys and values by layer, allocated when a layer first brings some; and which tokens they are of."""

    def __init__(self, count: int, capacity: int) -> None:
        """Room for `count` conversations of at most `capacity` tokens."""
        capacity = -(-capacity // TILE) * TILE
        self.count, self.capacity = count, capacity
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._ids = np.full((count, capacity), -1, dtype=np.int64)
        self._planned = np.zeros(count, dtype=np.int64)
        self._present = np.zeros(count, dtype=np.int64)

    def write(self, layer: int, keys_KND: Tensor, values_KND: Tensor, step: Step) -> None:
        """Store a step's keys and values of one layer."""
        if layer not in self._layers:
            self._layers[layer] = (self._room(keys_KND), self._room(values_KND))
        for store_SKCD, new_KND in zip(self._layers[layer], (keys_KND, values_KND), strict=True):
            store_SKCD[step.slots_N, :, step.positions_N] = new_KND.transpose(0, 1)

    def _room(self, like_KND: Tensor) -> Tensor:
        """Zeros (S, K, C, D): what nobody wrote is read, weighted by 0, where a neighbour is longer."""
        shape = (self.count, like_KND.shape[0], self.capacity, like_KND.shape[2])
        if like_KND.device.type != "cpu":
            return like_KND.new_zeros(shape)
        # NumPy's zeros take no memory before they are written; a rare long prompt would cost much.
        size = math.prod(shape) * like_KND.element_size()
        return torch.from_numpy(np.zeros(size, np.uint8)).view(like_KND.dtype).view(shape)

    def read(self, layer: int, slots: slice, length: int) -> tuple[Tensor, Tensor]:
        """Views (P, K, T, D) of the first `length` positions."""
        keys_SKCD, values_SKCD = self._layers[layer]
        return keys_SKCD[slots, :, :length], values_SKCD[slots, :, :length]

    def find(self, ids: Sequence[int], free: Collection[int]) -> Found:
        """The slot for a conversation that begins with `ids`, and from which one it can start.

        The last two tokens are never shared: logits are needed, and come from a segment's last token.
        """
        wanted = np.asarray(ids[:-2], dtype=np.int64)
        same = (self._ids[:, : len(wanted)] == wanted).cumprod(axis=1).sum(axis=1)
        has = np.minimum(same, self._present)
        source = int(has.argmax())
        # The free slot that shares most, so that no other conversation is lost; else the emptiest.
        slot = max(free, key=lambda number: (has[number], -self._present[number], -number))
        if has[slot] == has[source]:
            source = slot
        coming = int(np.minimum(same, self._planned).max())
        return Found(slot, source, int(has[source]), coming)

    def begin(self, found: Found, ids: Sequence[int]) -> None:
        """Give a slot to a conversation; what it shares with another is copied."""
        slot, source, shared = found.slot, found.source, found.shared
        if shared and source != slot:
            for store_SKCD in (store for pair in self._layers.values() for store in pair):
                store_SKCD[slot, :, :shared] = store_SKCD[source, :, :shared]
        self._ids[slot] = -1
        self._ids[slot, : len(ids)] = ids
        self._planned[slot], self._present[slot] = len(ids), shared

    def follow(self, slot: int, token: int) -> None:
        """`token` is the next one of a slot's conversation."""
        self._ids[slot, self._planned[slot]] = token
        self._planned[slot] += 1

    def computed(self, slot: int, present: int) -> None:
        """The first `present` tokens of a slot have keys and values now."""
        self._present[slot] = present

    def tile_mask(self, tile: int, window: int | None, device: torch.device) -> Tensor:
        """(TILE, T), added to the scores of a tile's queries over all positions up to its end."""
        if (tile, window) not in self._masks:
            queries = torch.arange(tile * TILE, (tile + 1) * TILE, device=device)
            self._masks[tile, window] = _added(_seen(queries, (tile + 1) * TILE, window))
        return self._masks[tile, window]

    def grow(self, count: int, capacity: int) -> None:
        """Make room for at least so many conversations of at least so many tokens; those here stay."""
        old, count, capacity = self.count, max(count, self.count), max(capacity, self.capacity)
        if (count, capacity) == (self.count, self.capacity):
            return
        larger = Slots(count, capacity)
        for layer, pair in self._layers.items():
            wider = larger._room(pair[0][0]), larger._room(pair[1][0])
            for store_SKCD, old_SKCD in zip(wider, pair, strict=True):
                store_SKCD[:old, :, : self.capacity] = old_SKCD
            larger._layers[layer] = wider
        larger._ids[:old, : self.capacity] = self._ids
        larger._planned[:old], larger._present[:old] = self._planned, self._present
        self.__dict__.update(larger.__dict__)


class Segment(NamedTuple):
    """Several tokens of one conversation."""

    slot: int
    begin: int
    """Place of the first among the step's tokens."""
    count: int
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
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    step: Step,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a step's tokens: query (1, H, N, D), key and value (1, K, N, D); gives (1, N, H, D)."""
    query_NHD = query[0].transpose(0, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    step.slots.write(module.layer_idx, key[0], value[0], step)
    parts = [
        _single(step, number, module.layer_idx, query_NHD, scale, sliding_window)
        for number in range(len(step.groups))
    ]
    parts += [
        _several(step, number, module.layer_idx, query, scale, sliding_window)
        for number in range(len(step.segments))
    ]
    return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None], None


def _single(
    step: Step, number: int, layer: int, query_NHD: Tensor, scale: float, window: int | None
) -> Tensor:
    """One new token for each slot of a group, without repeating keys for grouped queries; (P, H, D)."""
    group = step.groups[number]
    keys_PKTD, values_PKTD = step.slots.read(layer, group.slots, group.length)
    P, K = keys_PKTD.shape[:2]
    query_PKGD = query_NHD[group.rows].reshape(P, K, -1, query_NHD.shape[2]) * scale
    scores_PKGT = torch.matmul(query_PKGD, keys_PKTD.transpose(2, 3)).float()
    mask_P11T = step.mask(number, window)
    if mask_P11T is not None:
        scores_PKGT += mask_P11T
    weights_PKGT = scores_PKGT.softmax(dim=-1).to(values_PKTD.dtype)
    return torch.matmul(weights_PKGT, values_PKTD).flatten(1, 2)


def _several(
    step: Step, number: int, layer: int, query_1HND: Tensor, scale: float, window: int | None
) -> Tensor:
    """A segment's tokens after all that its slot holds before them; (count, H, D).

    Tiles lie at fixed positions of the conversation and are always computed whole, so that a token's
    result is the same, bit by bit, however its prompt was cut into segments.
    """
    segment = step.segments[number]
    end = segment.start + segment.count
    parts = []
    for tile in range(segment.start // TILE, (end + TILE - 1) // TILE):
        first, last = max(segment.start, tile * TILE), min(end, (tile + 1) * TILE)
        rows = slice(first - tile * TILE, last - tile * TILE)
        begin = segment.begin - segment.start + first
        keys, values = step.slots.read(
            layer, slice(segment.slot, segment.slot + 1), (tile + 1) * TILE
        )
        keys_KTD, values_KTD = keys[0], values[0]
        K, T, D = keys_KTD.shape
        query_HQD = query_1HND.new_zeros(query_1HND.shape[1], TILE, D)
        query_HQD[:, rows] = query_1HND[0, :, begin : begin + last - first] * scale
        scores = torch.matmul(query_HQD.view(K, -1, D), keys_KTD.transpose(1, 2)).float()
        scores_KGQT = scores.view(K, -1, TILE, T)
        scores_KGQT += step.slots.tile_mask(tile, window, scores.device)
        weights = scores.softmax(dim=-1).to(values_KTD.dtype)
        out_HQD = torch.matmul(weights, values_KTD).view(query_HQD.shape[0], TILE, -1)
        parts.append(out_HQD[:, rows].transpose(0, 1))
    return torch.cat(parts)


AttentionInterface.register(ATTENTION, _attend)


@contextmanager
def slot_attention(model: Any) -> Iterator[None]:
    """Inside, the model's layers attend through slots, and its forward pass takes a `step`."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
