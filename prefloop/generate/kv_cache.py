"""Keys and values of conversations, a slot each.

A conversation that has ended stays in its slot until the slot is needed: one that begins with the same
tokens starts from its keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# S slots, N tokens of a step, P slots read together, K key/value heads, C positions of a slot, T positions
# read, D head dimension.

# Attention of several tokens is computed in pieces of so many positions; a slot has room for whole ones.
TILE = 64


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
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._ids = np.full((count, capacity), -1, dtype=np.int64)
        self._planned = np.zeros(count, dtype=np.int64)
        self._present = np.zeros(count, dtype=np.int64)

    def write(self, layer: int, new: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor]) -> None:
        """Store one layer's new keys and values, each (K, N, D), at slots and positions, each (N,)."""
        if layer not in self._layers:
            self._layers[layer] = (self._room(new[0]), self._room(new[1]))
        slots_N, positions_N = at
        for store_SKCD, new_KND in zip(self._layers[layer], new, strict=True):
            store_SKCD[slots_N, :, positions_N] = new_KND.transpose(0, 1)

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
