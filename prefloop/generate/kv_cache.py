"""KV cache with one slot per conversation.

A finished conversation stays in its slot until the slot is needed: a new one with a common prefix reuses its
keys and values. Of a prompt that was asked for more than once a copy stays even longer, in a shelf beside the slots:
it may well be asked for again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from mmap import ACCESS_COPY, mmap
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# S slots, with the shelf's, N tokens of a step, P slots read together, K key/value heads, C positions of a slot, T positions
# read, D head dimension.

# Attention of several tokens is computed in tiles of this many positions; a slot's capacity is a multiple of it.
TILE = 64
# Longer prompts, in tokens, are not put on the shelf: memory.
_SHORT = 4 * TILE


class SlotMatch(NamedTuple):
    """The slot for a new conversation, and the prefix that it can reuse."""

    slot: int
    source: int
    """The slot whose conversation has the longest common prefix."""
    shared: int
    """Tokens of the common prefix whose keys and values are computed."""
    coming: int
    """Tokens of a common prefix that will be computed once the running prompts are fed."""


class Slots:
    """Keys and values by layer, allocated at a layer's first write, and the token ids that they belong to."""

    def __init__(self, count: int, capacity: int, shelf: int = 0) -> None:
        """A cache of `count` conversations of at most `capacity` tokens, and of `shelf` prompts that were asked for again.

        A shelf takes memory for what stands in it on CPUs, elsewhere for prompts of full length.
        """
        capacity = -(-capacity // TILE) * TILE
        self.count, self.capacity, self.shelf = count, capacity, shelf
        rows = count + shelf
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._ids = np.full((rows, capacity), -1, dtype=np.int64)
        self._lengths = np.zeros(rows, dtype=np.int64)
        self._computed = np.zeros(rows, dtype=np.int64)
        self._tiled = np.zeros(rows, dtype=np.int64)
        self._prompts = np.zeros(rows, dtype=np.int64)
        """Tokens that each conversation began with."""
        self._repeated = np.zeros(rows, dtype=np.int64)
        """The same, where they had been asked for before; else 0."""
        self._next_on_shelf = 0

    def write(self, layer: int, new: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor]) -> None:
        """Store one layer's new keys and values, each (K, N, D), at slots and positions, each (N,)."""
        slots_N, positions_N = at
        for store_SKCD, new_KND in zip(self._layers[layer], new, strict=True):
            store_SKCD[slots_N, :, positions_N] = new_KND.transpose(0, 1)

    def layer(self, layer: int, K: int, D: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, each (S, K, C, D), of the dtype and on the device of `like`."""
        if layer not in self._layers:
            self._layers[layer] = (self._zeros(K, D, like), self._zeros(K, D, like))
        return self._layers[layer]

    def _zeros(self, K: int, D: int, like: Tensor) -> Tensor:
        """Zeros (S, K, C, D), as unwritten positions are read, with weight 0, where a neighbouring slot is longer."""
        shape = (self.count + self.shelf, K, self.capacity, D)
        if like.device.type != "cpu":
            return like.new_zeros(shape)
        # Pages of their own take no memory until written, which matters for the shelf and the capacity of a rare long
        # prompt. Zeros from the allocator do where it reuses what was freed (machine.keep_freed_memory).
        size = math.prod(shape) * like.element_size()
        try:
            pages = mmap(-1, size, access=ACCESS_COPY)
        except OSError as error:
            # As torch says it (machine.is_out_of_memory): fewer rows may fit.
            raise RuntimeError(f"can't allocate memory for {size} bytes of a KV cache") from error
        return torch.frombuffer(pages, dtype=like.dtype).view(shape)

    def read(self, layer: int, slots: slice, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` positions, views of (P, K, T, D)."""
        keys_SKCD, values_SKCD = self._layers[layer]
        return keys_SKCD[slots, :, :length], values_SKCD[slots, :, :length]

    def find(self, ids: Sequence[int], free: Collection[int], *, tiled: bool = False) -> SlotMatch:
        """The slot for a conversation that starts with `ids`, and the slot whose prefix it can reuse.

        The last two tokens are never reused, as logits are computed at the last token of a segment. With `tiled`
        only what was computed in tiles is: keys of sampled tokens have other last bits where torch attends.
        """
        prefix = np.asarray(ids[:-2], dtype=np.int64)
        common = (self._ids[:, : len(prefix)] == prefix).cumprod(axis=1).sum(axis=1)
        available = np.minimum(common, self._tiled if tiled else self._computed)
        source = int(available.argmax())
        # The free slot with the longest prefix, so that no other conversation is overwritten; else the emptiest.
        slot = max(free, key=lambda number: (available[number], -self._computed[number], -number))
        if available[slot] == available[source]:
            source = slot
        # Of a conversation that has ended nothing more is coming, whether its slot may be taken or not.
        running = self._lengths > self._computed
        running[list(free)] = False
        coming = int(np.minimum(common, self._lengths)[running].max(initial=0))
        return SlotMatch(slot, source, int(available[source]), coming)

    def begin(self, match: SlotMatch, ids: Sequence[int], *, prompt: bool = True) -> None:
        """Assign the matched slot to a conversation, and copy the common prefix from another slot.

        `prompt`: whether `ids` are a prompt, for answers to come, and so may be asked for again.
        """
        slot, source, shared = match.slot, match.source, match.shared
        length = len(ids)
        again = self._prompts[source] == length and self._begins(source, ids)
        known = int(self._repeated[slot])
        if known and not self._begins(slot, ids[:known]):
            self._shelve(slot, known, source)
            known = 0
        self._copy(source, slot, shared)
        self._ids[slot] = -1
        self._ids[slot, :length] = ids
        self._lengths[slot], self._computed[slot] = length, shared
        self._tiled[slot] = min(shared, int(self._tiled[source]))
        self._prompts[slot] = length if prompt else 0
        self._repeated[slot] = length if again and prompt and length <= _SHORT else known

    def _begins(self, slot: int, ids: Sequence[int]) -> bool:
        return bool((self._ids[slot, : len(ids)] == ids).all())

    def _copy(self, source: int, to: int, length: int) -> None:
        """Copy keys and values of the first `length` positions."""
        if length and source != to:
            for store_SKCD in (store for pair in self._layers.values() for store in pair):
                store_SKCD[to, :, :length] = store_SKCD[source, :, :length]

    def _shelve(self, slot: int, length: int, needed: int) -> None:
        """Keep the first `length` tokens of a slot on the shelf, in the place of what has stood there longest.

        Not in the place of row `needed`, which is about to be copied from.
        """
        ids = self._ids[slot, :length].copy()
        if not self.shelf or (self._ids[self.count :, :length] == ids).all(axis=1).any():
            return
        place = self.count + self._next_on_shelf
        self._next_on_shelf = (self._next_on_shelf + 1) % self.shelf
        if place == needed:
            return
        self._copy(slot, place, length)
        self._ids[place] = -1
        self._ids[place, :length] = ids
        self._lengths[place] = self._computed[place] = length
        self._tiled[place] = min(length, int(self._tiled[slot]))

    def follow(self, slot: int, token: int) -> None:
        """Append a token to a slot's conversation."""
        self._ids[slot, self._lengths[slot]] = token
        self._lengths[slot] += 1

    def computed(self, slot: int, present: int, *, tiled: bool) -> None:
        """Record that the first `present` tokens of a slot have keys and values, the newest computed in tiles or singly."""
        if tiled and self._tiled[slot] == self._computed[slot]:
            self._tiled[slot] = present
        self._computed[slot] = present

    def grow(self, count: int, capacity: int, shelf: int = 0) -> None:
        """Enlarge the cache to at least so many slots and tokens, with its contents but for the shelf's."""
        old, count, capacity = self.count, max(count, self.count), max(capacity, self.capacity)
        if (count, capacity) == (self.count, self.capacity):
            return
        larger = Slots(count, capacity, max(shelf, self.shelf))
        for layer, pair in self._layers.items():
            _, K, _, D = pair[0].shape
            wider = larger.layer(layer, K, D, pair[0])
            for store_SKCD, old_SKCD in zip(wider, pair, strict=True):
                store_SKCD[:old, :, : self.capacity] = old_SKCD[:old]
        larger._ids[:old, : self.capacity] = self._ids[:old]
        for name in ("_lengths", "_computed", "_tiled", "_prompts", "_repeated"):
            getattr(larger, name)[:old] = getattr(self, name)[:old]
        self.__dict__.update(larger.__dict__)
