"""Attention by chains against attention under the whole mask."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from prefloop.train.packing import TokenGroup, pack
from prefloop.train.tree_attention import Chain, chains, tree_attention

tokens = st.integers(0, 2)
groups = st.builds(
    TokenGroup,
    prompt=st.lists(tokens, min_size=1, max_size=4).map(tuple),
    completions=st.lists(st.lists(tokens, max_size=7).map(tuple), min_size=1, max_size=5).map(
        tuple
    ),
)


def row_of(*found: TokenGroup):
    (row,) = pack(found, 10_000)
    return row


@settings(max_examples=40, deadline=None)
@given(st.lists(groups, min_size=1, max_size=4), st.integers(0, 2**20))
def test_states_and_gradients_are_those_under_the_mask(found, seed):
    row = row_of(*found)
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, h, len(row.ends), 8, requires_grad=True) for h in (6, 2, 2))
    repeated = (x.repeat_interleave(3, 1) for x in (k, v))
    wanted = scaled_dot_product_attention(q, *repeated, attn_mask=row.mask(), scale=0.3)
    got = tree_attention(q, k, v, row.ends, scaling=0.3)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    weights = torch.randn_like(got)
    for got_gradient, wanted_gradient in zip(
        torch.autograd.grad((got * weights).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got_gradient, wanted_gradient, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(groups, min_size=1, max_size=4))
def test_chains_and_their_ancestors_are_what_the_mask_shows(found):
    row = row_of(*found)
    seen = torch.zeros(len(row.ends), len(row.ends), dtype=torch.bool)
    for chain in chains(tuple(row.ends.tolist())):
        for node in range(chain.start, chain.end):
            for start, end in (*chain.ancestors, (chain.start, node + 1)):
                seen[node, start:end] = True
    assert torch.equal(seen, row.mask())


def test_a_pair_is_its_longer_run_and_one_branch():
    row = row_of(TokenGroup((1, 2), ((3, 4, 5), (3, 6))))
    assert chains(tuple(row.ends.tolist())) == [Chain(0, 5, ()), Chain(5, 6, ((0, 3),))]


def test_no_scores_are_computed_between_trees(monkeypatch):
    """The reason for all this: two equal trees cost twice what one does, not four times."""

    def cost(row) -> int:
        scores = []

        def counted(q, k, v, **options):
            scores.append(q.shape[2] * k.shape[2])
            return scaled_dot_product_attention(q, k, v, **options)

        monkeypatch.setattr("prefloop.train.tree_attention.scaled_dot_product_attention", counted)
        q, k, v = (torch.randn(1, 2, len(row.ends), 8) for _ in range(3))
        tree_attention(q, k, v, row.ends)
        return sum(scores)

    group = TokenGroup((1, 2, 3), ((4, 5), (6, 7)))
    assert cost(row_of(group)) == 5 * 5 + 2 * 5
    assert cost(row_of(group, group)) == 2 * cost(row_of(group))


def test_dropout_of_attention_reaches_every_chain():
    row = row_of(TokenGroup((1,), ((2, 3), (4,))))
    ones = torch.ones(1, 1, len(row.ends), 8)
    torch.manual_seed(0)
    states = tree_attention(ones, ones, ones, row.ends, dropout=0.5)
    assert not torch.equal(states, ones)
    torch.testing.assert_close(tree_attention(ones, ones, ones, row.ends), ones)


def test_bfloat16_is_attended_in_float32_and_rounded_once() -> None:
    row = row_of(TokenGroup((1, 2, 3), ((4, 5), (4, 6, 7))))
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, len(row.input_ids), 8, generator=generator).bfloat16()
        for heads in (4, 2, 2)
    ]
    expected = tree_attention(*(x.float() for x in states), row.ends)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = tree_attention(*states, row.ends)
        torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
