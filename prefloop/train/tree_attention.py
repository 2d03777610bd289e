"""Attention along prefix trees on CPUs, without computing what a mask would hide.

A mask over a whole row makes attention compute every pair of tokens and throw most away: those of other
trees, of other branches, and half of the rest. Here each run of first children attends by itself, causally,
to the ancestors before it. In transformers' registry of attention functions this file takes the place of
"sdpa": where the mask is not one but the ends of the nodes' subtrees, integers, which SDPA knows not, it
attends by chains; any mask that SDPA does know goes to it unchanged.

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
    """Intervals of the nodes above the first, in order of depth."""


class Plan(NamedTuple):
    """A row cut so that every chain and its ancestors are whole pieces."""

    sizes: tuple[int, ...]
    """Of the pieces."""
    chains: tuple[tuple[int, tuple[int, ...], Tensor | None], ...]
    """By chain: how many pieces it has; the pieces it attends to, its own last; (L, P + L) mask, or causal."""


def subtree_ends(ends: Tensor) -> Tensor:
    """What the attention gets as its mask: (1, 1, 1, T), four-dimensional so that models pass it on."""
    return ends[None, None, None]


def chains(ends: tuple[int, ...]) -> list[Chain]:
    """A row's chains from its subtrees' ends, nodes being in depth-first order."""
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
            # Subtrees along a chain end ever earlier: the parent is the last that reaches this node.
            parent = max(n for n in range(start, node) if ends[n] > node)
            ancestors = (*above, (start, parent + 1))
        path.append((node, ancestors))
        starts.append((node, ancestors))
    bounds = [*(start for start, _ in starts), len(ends)]
    return [
        Chain(start, end, above) for (start, above), end in zip(starts, bounds[1:], strict=True)
    ]


@lru_cache(maxsize=8)  # every layer asks for the same few rows
def _plan(ends: tuple[int, ...]) -> Plan:
    found = chains(ends)
    cuts = {0, len(ends)}
    for chain in found:
        cuts.update((chain.start, *(bound for span in chain.ancestors for bound in span)))
    bounds = sorted(cuts)
    places = {bound: place for place, bound in enumerate(bounds)}
    planned = []
    for chain in found:
        spans = (*chain.ancestors, (chain.start, chain.end))
        pieces = tuple(n for a, b in spans for n in range(places[a], places[b]))
        own = places[chain.end] - places[chain.start]
        mask_LP = None
        if chain.ancestors:
            length, before = chain.end - chain.start, sum(b - a for a, b in chain.ancestors)
            mask_LP = torch.ones(length, before + length, dtype=torch.bool).tril(before)
        planned.append((own, pieces, mask_LP))
    return Plan(tuple(b - a for a, b in pairwise(bounds)), tuple(planned))


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """Each node's attention to its ancestors and itself.

    query (1, H, T, D), key and value (1, K, T, D), ends (T,) one past each node's subtree; returns
    (1, H, T, D). `scaling` of the scores is 1 / sqrt(D) where it is None.
    """
    plan = _plan(tuple(ends.tolist()))
    queries, keys, values = (torch.split(x, list(plan.sizes), dim=2) for x in (query, key, value))
    found, first = [], 0
    for own, pieces, mask_LP in plan.chains:
        found.append(
            scaled_dot_product_attention(
                _joined(queries[first : first + own]),
                _joined([keys[n] for n in pieces]),
                _joined([values[n] for n in pieces]),
                attn_mask=None if mask_LP is None else mask_LP.to(query.device),
                dropout_p=dropout,
                is_causal=mask_LP is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
        first += own
    return _joined(found)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=2)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: (1, H, T, D) in, (1, T, H, D) out."""
    if attention_mask is None or attention_mask.dtype != torch.long:
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return usual
    ends = attention_mask[0, 0, 0]
    states = tree_attention(query, key, value, ends, dropout=dropout, scaling=scaling)
    return states.transpose(1, 2).contiguous(), None


# Not under a name of its own, set on the model around a forward pass: gradient checkpointing computes
# attention again in the backward pass, when that name would be gone.
AttentionInterface.register("sdpa", _attend)
