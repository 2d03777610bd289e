"""Attention along prefix trees on CPUs, without computing what a mask would hide.

With a mask over a whole row, attention computes every pair of tokens and discards most: those of other trees,
of other branches, and half of the rest. Here each chain (a run of first children) attends causally to itself
and its ancestors. This file replaces "sdpa" in transformers' registry of attention functions: where the "mask"
holds the integer ends of the nodes' subtrees, attention is computed chain by chain; a real mask is passed on to
SDPA unchanged.

Shapes: T tokens of a row, L of one chain, P ancestors before it; H query heads, K key/value heads, D head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class Chain(NamedTuple):
    """A run of nodes in which each is the first child of the one before."""

    start: int
    end: int
    ancestors: tuple[tuple[int, int], ...]
    """Intervals of the ancestors of the chain's first node, in order of depth."""


class RowPlan(NamedTuple):
    """A division of a row into pieces, such that every chain and its ancestors are whole pieces."""

    sizes: tuple[int, ...]
    """Length of each piece."""
    chains: tuple[tuple[int, tuple[int, ...], Tensor | None], ...]
    """For each chain: its number of pieces; indices of the pieces it attends to, its own last; the (L, P + L)
    mask, None for a causal one."""


def subtree_ends(ends: Tensor) -> Tensor:
    """The ends as the attention's "mask": (1, 1, 1, T), four-dimensional so that models pass it on."""
    return ends[None, None, None]


def chains(ends: tuple[int, ...]) -> list[Chain]:
    """A row's chains, from the ends of its nodes' subtrees; nodes are in depth-first order."""
    starts: list[tuple[int, tuple[tuple[int, int], ...]]] = []
    path: list[tuple[int, tuple[tuple[int, int], ...]]] = []
    for node in range(len(ends)):
        if node and ends[node - 1] > node:
            continue  # the first child of the node before
        while path and ends[path[-1][0]] <= node:
            path.pop()
        ancestors: tuple[tuple[int, int], ...] = ()
        if path:
            start, above = path[-1]
            # Subtrees along a chain end earlier and earlier: the parent is the last one that contains this node.
            parent = max(n for n in range(start, node) if ends[n] > node)
            ancestors = (*above, (start, parent + 1))
        path.append((node, ancestors))
        starts.append((node, ancestors))
    bounds = [*(start for start, _ in starts), len(ends)]
    return [
        Chain(start, end, above) for (start, above), end in zip(starts, bounds[1:], strict=True)
    ]


@lru_cache(maxsize=8)  # all layers need the same few rows
def _plan(ends: tuple[int, ...]) -> RowPlan:
    row_chains = chains(ends)
    cuts = {0, len(ends)}
    for chain in row_chains:
        cuts.update((chain.start, *(bound for span in chain.ancestors for bound in span)))
    bounds = sorted(cuts)
    piece_index = {bound: index for index, bound in enumerate(bounds)}
    chain_plans = []
    for chain in row_chains:
        spans = (*chain.ancestors, (chain.start, chain.end))
        pieces = tuple(n for a, b in spans for n in range(piece_index[a], piece_index[b]))
        own = piece_index[chain.end] - piece_index[chain.start]
        mask_LP = None
        if chain.ancestors:
            length, before = chain.end - chain.start, sum(b - a for a, b in chain.ancestors)
            mask_LP = torch.ones(length, before + length, dtype=torch.bool).tril(before)
        chain_plans.append((own, pieces, mask_LP))
    return RowPlan(tuple(b - a for a, b in pairwise(bounds)), tuple(chain_plans))


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """Attention of each node to its ancestors and itself.

    query (1, H, T, D), key and value (1, K, T, D), ends (T,) one past each node's subtree; returns
    (1, H, T, D). `scaling` of the scores is 1 / sqrt(D) where it is None.

    Bfloat16 is computed in float32, autocast or not: torch's backward pass on CPUs takes 1.2 to 4.7 times as long
    in bfloat16 (docs/training-step.md).
    """
    plan = _plan(tuple(ends.tolist()))
    wide = (x.float() if x.dtype == torch.bfloat16 else x for x in (query, key, value))
    queries, keys, values = (torch.split(x, list(plan.sizes), dim=2) for x in wide)
    outputs, first = [], 0
    with torch.autocast(query.device.type, enabled=False):
        for own, pieces, mask_LP in plan.chains:
            outputs.append(
                scaled_dot_product_attention(
                    _concat(queries[first : first + own]),
                    _concat([keys[n] for n in pieces]),
                    _concat([values[n] for n in pieces]),
                    attn_mask=None if mask_LP is None else mask_LP.to(query.device),
                    dropout_p=dropout,
                    is_causal=mask_LP is None,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
            first += own
    return _concat(outputs).to(query.dtype)


def _concat(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=2)


def _tree_or_sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function in transformers' interface: inputs (1, H, T, D), output (1, T, H, D)."""
    if attention_mask is None or attention_mask.dtype != torch.long:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return output
    ends = attention_mask[0, 0, 0]
    states = tree_attention(query, key, value, ends, dropout=dropout, scaling=scaling)
    return states.transpose(1, 2).contiguous(), None


# Registered as "sdpa", not under its own name set around a forward pass: gradient checkpointing computes
# attention again in the backward pass, when that setting would be gone.
AttentionInterface.register("sdpa", _tree_or_sdpa_attention)
