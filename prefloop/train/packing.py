"""Packing of sequences with common prefixes into rows, so that no shared token is computed twice.

A group's sequences form a prefix tree: a token at the same position after the same tokens is one node. Each
node attends to its ancestors only and has its depth as position, so a causal transformer computes for it
exactly what it would in each sequence by itself. Several trees share a row. Independent of the model.

Shapes: T tokens (nodes) of a row, N tokens of it that are scored, L tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TokenGroup(NamedTuple):
    """A prompt and the completions to be scored after it, as token ids."""

    prompt: tuple[int, ...]
    """At least one token, as a sequence's first token cannot be scored."""
    completions: tuple[tuple[int, ...], ...]
    """At least one; they may be equal, or share prefixes."""

    @property
    def longest(self) -> int:
        """Length in tokens of the longest sequence, prompt included."""
        return len(self.prompt) + max(map(len, self.completions))


class Tree(NamedTuple):
    """A group as a prefix tree, nodes in depth-first order: a node's subtree is one interval."""

    tokens: tuple[int, ...]
    """Token of each node; the prompt is nodes 0 .. prompt_length - 1."""
    positions: tuple[int, ...]
    """Depth of each node, which is its token's position in every sequence through it."""
    parents: tuple[int, ...]
    """The node that predicts each node; -1 for the root."""
    ends: tuple[int, ...]
    """One past the last node of each node's subtree."""
    paths: tuple[tuple[int, ...], ...]
    """By completion, in the group's order: the node of each of its tokens."""
    prompt_length: int

    @property
    def size(self) -> int:
        """Number of nodes: the tokens that the model computes."""
        return len(self.tokens)


def build_tree(group: TokenGroup) -> Tree:
    """The prefix tree of a group; the same tree, paths aside, whatever the completions' order."""
    assert group.prompt, "a group needs a prompt of at least one token"
    assert group.completions, "a group needs a completion"
    prompt_length = len(group.prompt)
    tokens, parents = list(group.prompt), list(range(-1, prompt_length - 1))
    positions = list(range(prompt_length))
    children: dict[tuple[int, int], int] = {}
    paths: dict[tuple[int, ...], tuple[int, ...]] = {}
    # In sorted order a new node never joins a subtree that a later node has already followed.
    for completion in sorted(set(group.completions)):
        node, path = prompt_length - 1, []
        for token in completion:
            child = children.setdefault((node, token), len(tokens))
            if child == len(tokens):
                tokens.append(token)
                parents.append(node)
                positions.append(positions[node] + 1)
            path.append(child)
            node = child
        paths[completion] = tuple(path)
    return Tree(
        tokens=tuple(tokens),
        positions=tuple(positions),
        parents=tuple(parents),
        ends=_subtree_ends(parents, prompt_length),
        paths=tuple(paths[completion] for completion in group.completions),
        prompt_length=prompt_length,
    )


def _subtree_ends(parents: Sequence[int], prompt_length: int) -> tuple[int, ...]:
    size = len(parents)
    # All that comes after a token of the prompt is below it.
    ends = [size] * prompt_length + list(range(prompt_length + 1, size + 1))
    for node in range(size - 1, prompt_length, -1):
        ends[parents[node]] = max(ends[parents[node]], ends[node])
    return tuple(ends)


class Slot(NamedTuple):
    """The position of a completion's log-probs in its row."""

    group: int
    completion: int
    scored: Tensor
    """(L,) index of each of its tokens among the row's N scored tokens."""


@dataclass(frozen=True)
class Row:
    """One or more trees side by side: the input of one forward pass, without padding."""

    input_ids: Tensor
    """(T,) the nodes' tokens."""
    position_ids: Tensor
    """(T,) each node's depth in its tree."""
    ends: Tensor
    """(T,) one past the last node of each node's subtree."""
    predictors: Tensor
    """(N,) the node whose hidden state predicts each scored token; a fork occurs once for each branch."""
    targets: Tensor
    """(N,) the scored tokens: every distinct token of every completion, once."""
    slots: tuple[Slot, ...]

    def mask(self) -> Tensor:
        """(T, T) bool attention mask: node i (row) attends to node j (column) if j is i or its ancestor."""
        index_T = torch.arange(len(self.input_ids))
        return (index_T <= index_T[:, None]) & (index_T[:, None] < self.ends)


def pack(groups: Sequence[TokenGroup], token_budget: int) -> list[Row]:
    """Rows of at most `token_budget` tokens that hold every group once, by first-fit-decreasing.

    A group is never divided: one larger than the budget gets a row of its own. The rows do not depend on the
    order of the groups.
    """
    assert token_budget > 0, "a row needs room for a token"
    trees = [build_tree(group) for group in groups]
    bins: list[list[int]] = []
    filled: list[int] = []
    # Ties are broken by content, for independence of the groups' order.
    by_size = sorted(
        enumerate(trees), key=lambda item: (-item[1].size, item[1].tokens, item[1].ends)
    )
    for g, tree in by_size:
        fits = (b for b, used in enumerate(filled) if used + tree.size <= token_budget)
        b = next(fits, len(bins))
        if b == len(bins):
            bins.append([])
            filled.append(0)
        bins[b].append(g)
        filled[b] += tree.size
    return [_row(members, trees) for members in bins]


def _row(members: Sequence[int], trees: Sequence[Tree]) -> Row:
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    slots: list[Slot] = []
    for g in members:
        tree, start = trees[g], len(tokens)
        # Every node after the prompt is scored once, so node n is scored token n + offset.
        offset = len(targets) - tree.prompt_length
        slots += [
            Slot(g, c, torch.tensor([node + offset for node in path], dtype=torch.long))
            for c, path in enumerate(tree.paths)
        ]
        tokens += tree.tokens
        positions += tree.positions
        ends += [start + end for end in tree.ends]
        predictors += [start + parent for parent in tree.parents[tree.prompt_length :]]
        targets += tree.tokens[tree.prompt_length :]
    return Row(
        input_ids=torch.tensor(tokens),
        position_ids=torch.tensor(positions),
        ends=torch.tensor(ends),
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        slots=tuple(slots),
    )
