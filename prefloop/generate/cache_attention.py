"""Attention for a decoding step: tokens of many conversations in one row, without padding.

Linear layers do not depend on which conversation a token belongs to; attention does, so we register an
attention function with transformers, which gets a `Step` that maps tokens to slots and positions.

Results are bitwise independent of the other conversations in the step: sums are always divided at the same
positions of a conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from prefloop.generate.cpu import attention
from prefloop.generate.kv_cache import TILE, Slots

# N tokens of a step, P slots of a group, H query heads, K key/value heads, G query heads for each of
# those, T positions read, D head dimension, Q queries of a tile.

ATTENTION = "prefloop_slots"
# Lengths are rounded up to a multiple of this: the last bits of a product can depend on odd lengths.
_LENGTH_MULTIPLE = 32
# Cost of one more group, in key/value positions that could be read in the same time.
_GROUP_COST = 400


class Segment(NamedTuple):
    """Several tokens of one conversation."""

    slot: int
    begin: int
    """Index of the first one among the step's tokens."""
    length: int
    start: int
    """Position of the first one in its conversation."""


class Group(NamedTuple):
    """Neighbouring slots with one token each in the step, read together."""

    rows: slice
    slots: slice
    length: int


@dataclass
class Step:
    """The slots and positions of a step's tokens: first single tokens by slot, then segments."""

    slots: Slots
    slots_N: Tensor
    positions_N: Tensor
    singles: list[tuple[int, int]]
    """Slot and position of each single token."""
    segments: list[Segment]
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    @staticmethod
    def plan(slots: Slots, feeds: Sequence[tuple[int, int, int]], device: torch.device) -> Step:
        """A step of `feeds`: (slot, position of the first token, number of tokens), single tokens first, by slot."""
        slot_N = np.repeat([slot for slot, _, _ in feeds], [count for _, _, count in feeds])
        position_N = np.concatenate([np.arange(p, p + n) for _, p, n in feeds])
        # Compiled attention writes where it is told to.
        assert position_N.max(initial=0) < slots.capacity, "a conversation is longer than its slot"
        singles = [(slot, position) for slot, position, count in feeds if count == 1]
        segments, begin = [], len(singles)
        for slot, position, count in feeds[len(singles) :]:
            segments.append(Segment(slot, begin, count, position))
            begin += count
        return Step(
            slots=slots,
            slots_N=torch.from_numpy(slot_N).to(device),
            positions_N=torch.from_numpy(position_N).to(device),
            singles=singles,
            segments=segments,
        )

    @cached_property
    def groups(self) -> list[Group]:
        """How torch reads the slots of single tokens."""
        return _group(self.singles)

    def mask(self, group_index: int, window: int | None) -> Tensor | None:
        """(P, 1, 1, T) additive mask of a group's scores; None where every row attends to all positions read."""
        if (group_index, window) not in self._masks:
            group = self.groups[group_index]
            visible_PT = _visible(self.positions_N[group.rows], group.length, window)
            self._masks[group_index, window] = (
                None if visible_PT.all() else _additive_mask(visible_PT)[:, None, None]
            )
        return self._masks[group_index, window]


def _visible(queries: Tensor, length: int, window: int | None) -> Tensor:
    """(queries, length) bool: which positions each query attends to; `queries` are positions too."""
    keys_T = torch.arange(length, device=queries.device)
    visible = keys_T <= queries[:, None]
    if window is not None:
        visible &= keys_T > queries[:, None] - window
    return visible


def _additive_mask(visible: Tensor) -> Tensor:
    mask = torch.zeros(visible.shape, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(torch.float32).min)


def _group(singles: Sequence[tuple[int, int]]) -> list[Group]:
    """Groups of neighbouring slots by (slot, position): the division that reads the fewest positions, groups counted too."""
    slots_R = np.array([slot for slot, _ in singles], dtype=np.int64)
    lengths_R = np.array([position + 1 for _, position in singles], dtype=np.int64)
    lengths_R = -(-lengths_R // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    costs, firsts = [0], [0]
    run = 0
    for end in range(1, len(singles) + 1):
        if end > 1 and slots_R[end - 1] != slots_R[end - 2] + 1:
            run = end - 1
        # What rows up to `end` cost, for each row of the run that the last group may begin with.
        longest = np.maximum.accumulate(lengths_R[run:end][::-1])[::-1]
        found = np.array(costs[run:end]) + longest * np.arange(end - run, 0, -1)
        best = int(found.argmin())
        costs.append(int(found[best]) + _GROUP_COST)
        firsts.append(run + best)
    groups: list[Group] = []
    end = len(singles)
    while end:
        first = firsts[end]
        slots = slice(int(slots_R[first]), int(slots_R[end - 1]) + 1)
        groups.append(Group(slice(first, end), slots, int(lengths_R[first:end].max())))
        end = first
    return groups[::-1]


def _attention_function(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: Step,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a step's tokens: query (1, H, N, D), key and value (1, K, N, D); returns (1, N, H, D)."""
    layer, window = module.layer_idx, options.get("sliding_window")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    query_NHD, new_KND = query[0].transpose(0, 1), (key[0], value[0])
    at = step.slots_N, step.positions_N
    store = step.slots.layer(layer, key.shape[1], key.shape[3], key)
    new_NKD = key[0].transpose(0, 1), value[0].transpose(0, 1)
    out_NHD = attention.attend(query_NHD, new_NKD, store, at, window=window, scale=scale)
    if out_NHD is not None:
        return out_NHD[None], None
    step.slots.write(layer, new_KND, at)
    query_NHD = query_NHD * scale
    parts = [
        _attend_group(step, number, layer, query_NHD, window) for number in range(len(step.groups))
    ]
    parts += [_attend_segment(step, segment, layer, query_NHD, window) for segment in step.segments]
    return torch.cat(parts)[None], None


def _attend_group(
    step: Step, group_index: int, layer: int, query_NHD: Tensor, window: int | None
) -> Tensor:
    """Attention of one new token per slot of a group, without repeating keys for grouped queries; (P, H, D)."""
    group = step.groups[group_index]
    keys_PKTD, values_PKTD = step.slots.read(layer, group.slots, group.length)
    P, K = keys_PKTD.shape[:2]
    query_PKGD = query_NHD[group.rows].reshape(P, K, -1, query_NHD.shape[2])
    G = query_PKGD.shape[2]
    if G > 1 and G % 2:
        # Products of three rows took 1.5 times as long as those of four.
        query_PKGD = functional.pad(query_PKGD, (0, 0, 0, 1))
    # Keys come first: as the second factor they would be copied to where products like them.
    scores_PKTG = torch.matmul(keys_PKTD, query_PKGD.transpose(2, 3))
    scores_PKGT = scores_PKTG.transpose(2, 3).float().contiguous()
    mask_P11T = step.mask(group_index, window)
    if mask_P11T is not None:
        scores_PKGT += mask_P11T
    weights_PKGT = scores_PKGT.softmax(dim=-1).to(values_PKTD.dtype)
    return torch.matmul(weights_PKGT, values_PKTD)[:, :, :G].flatten(1, 2)


def _attend_segment(
    step: Step, segment: Segment, layer: int, query_NHD: Tensor, window: int | None
) -> Tensor:
    """Attention of a segment's tokens to themselves and all earlier tokens of their slot; (length, H, D).

    Tiles have fixed positions in the conversation and are always computed whole, however its prompt is divided
    into segments.
    """
    _, H, D = query_NHD.shape
    end = segment.start + segment.length
    slot_range = slice(segment.slot, segment.slot + 1)
    parts = []
    for tile in range(segment.start // TILE, -(-end // TILE)):
        start, stop = tile * TILE, (tile + 1) * TILE
        first, last = max(segment.start, start), min(end, stop)
        begin = segment.begin - segment.start + first
        query_HQD = query_NHD.new_zeros(H, TILE, D)
        query_HQD[:, first - start : last - start] = query_NHD[
            begin : begin + last - first
        ].transpose(0, 1)
        keys, values = step.slots.read(layer, slot_range, stop)
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
    """(Q, T) additive mask of the scores of a tile's queries over all positions up to its end."""
    queries_Q = torch.arange(tile * TILE, (tile + 1) * TILE, device=device)
    return _additive_mask(_visible(queries_Q, (tile + 1) * TILE, window))


AttentionInterface.register(ATTENTION, _attention_function)


def slot_attention(model: Any) -> AbstractContextManager[None]:
    """A context in which the model attends through slots, and its forward pass takes a `step`."""
    return attending(model, ATTENTION)


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[None]:
    """A context in which the model uses another of transformers' attention implementations."""
    config = model.config.get_text_config()
    previous = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = previous
