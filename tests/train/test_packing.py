"""Prefix trees and rows, without a model."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.train.packing import TokenGroup, build_tree, pack

few = settings(max_examples=40, deadline=None)
tokens = st.integers(0, 3)
groups = st.builds(
    TokenGroup,
    prompt=st.lists(tokens, min_size=1, max_size=4).map(tuple),
    completions=st.lists(st.lists(tokens, max_size=6).map(tuple), min_size=1, max_size=5).map(
        tuple
    ),
)


def random_group(rng: random.Random) -> TokenGroup:
    """A prompt of 30-89 tokens and three completions of 20-59 that begin with different tokens."""
    prompt = tuple(rng.randrange(1000) for _ in range(rng.randrange(30, 90)))
    draws = ([rng.randrange(1000) for _ in range(rng.randrange(19, 59))] for _ in range(3))
    return TokenGroup(prompt, tuple((first, *rest) for first, rest in enumerate(draws)))


@few
@given(groups)
def test_every_completion_is_read_back_from_its_path(group):
    tree = build_tree(group)
    for completion, path in zip(group.completions, tree.paths, strict=True):
        assert tuple(tree.tokens[node] for node in path) == completion
        predictors = (len(group.prompt) - 1, *path)[: len(path)]
        assert tuple(tree.parents[node] for node in path) == predictors
        assert [tree.positions[node] for node in path] == [
            len(group.prompt) + i for i in range(len(path))
        ]


@few
@given(groups)
def test_a_tree_has_one_node_for_each_distinct_prefix(group):
    sequences = [group.prompt + completion for completion in group.completions]
    prefixes = {s[:end] for s in [group.prompt, *sequences] for end in range(1, len(s) + 1)}
    assert build_tree(group).size == len(prefixes)


@few
@given(st.lists(groups, min_size=1, max_size=4))
def test_a_node_sees_as_many_tokens_before_it_as_its_depth_whatever_else_is_in_the_row(batch):
    (row,) = pack(batch, 1000)
    assert torch.equal(row.mask().sum(1) - 1, row.position_ids)
    assert not row.mask().triu(1).any()


@few
@given(groups)
def test_the_mask_follows_the_parents(group):
    tree, (row,) = build_tree(group), pack([group], 1000)
    for node in range(tree.size):
        ancestors, at = [node], node
        while (at := tree.parents[at]) >= 0:
            ancestors.append(at)
        assert row.mask()[node].nonzero().flatten().tolist() == sorted(ancestors)


@few
@given(st.lists(groups, min_size=1, max_size=6), st.integers(1, 40))
def test_rows_hold_every_completion_once_within_the_budget(batch, budget):
    rows = pack(batch, budget)
    slots = [(slot.group, slot.completion) for row in rows for slot in row.slots]
    assert sorted(slots) == [
        (g, c) for g, group in enumerate(batch) for c in range(len(group.completions))
    ]
    for row in rows:
        trees = {slot.group for slot in row.slots}
        assert len(row.input_ids) == sum(build_tree(batch[g]).size for g in trees)
        assert len(row.input_ids) <= budget or len(trees) == 1
        for slot in row.slots:
            assert (
                tuple(row.targets[slot.scored].tolist())
                == batch[slot.group].completions[slot.completion]
            )


@few
@given(st.lists(groups, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_rows_do_not_depend_on_the_order_of_groups_and_completions(batch, rng):
    shuffled = [
        TokenGroup(g.prompt, tuple(rng.sample(g.completions, len(g.completions)))) for g in batch
    ]
    rng.shuffle(shuffled)
    rows, again = pack(batch, 20), pack(shuffled, 20)
    assert [row.input_ids.tolist() for row in rows] == [row.input_ids.tolist() for row in again]
    assert [row.ends.tolist() for row in rows] == [row.ends.tolist() for row in again]


def test_a_fork_predicts_once_per_branch():
    (row,) = pack([TokenGroup((7,), ((1, 2), (1, 3)))], 8)
    assert row.input_ids.tolist() == [7, 1, 2, 3]
    assert row.predictors.tolist() == [0, 1, 1]
    assert row.position_ids.tolist() == [0, 1, 2, 2]


def test_equal_completions_share_all_nodes():
    tree = build_tree(TokenGroup((7,), ((1, 2), (1, 2))))
    assert tree.paths == ((1, 2), (1, 2))
    assert tree.size == 3


@few
@given(st.lists(groups, min_size=2, max_size=8), st.integers(1, 40))
def test_no_two_rows_fit_into_one(batch, budget):
    sizes = sorted(len(row.input_ids) for row in pack(batch, budget))
    assert len(sizes) == 1 or sizes[0] + sizes[1] > budget


def test_no_token_of_32_groups_is_padding_or_computed_twice():
    rng = random.Random(0)
    batch = [random_group(rng) for _ in range(32)]
    computed = sum(len(row.input_ids) for row in pack(batch, 1024))
    padded = sum(len(group.completions) for group in batch) * max(g.longest for g in batch)
    assert computed == sum(len(g.prompt) + sum(map(len, g.completions)) for g in batch)
    assert computed < 0.5 * padded
