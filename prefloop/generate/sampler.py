"""Drawing tokens: exactly the truncated distribution, without sorting the vocabulary.

A token is the inverse of the cumulative distribution, likeliest token first, at a uniform number of the
request's own. The likeliest few tokens nearly always decide; a row in which they do not is decided among
more, in the end among all. Temperature, top-k, top-p and min-p act in this order and mean what they mean
in transformers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefloop.records import Sampling

# B rows, V vocabulary, C candidates.

# How many of the likeliest tokens are looked at, for rows that fewer do not decide.
_SIZES = (64, 1024)


class _Candidates(NamedTuple):
    """The likeliest tokens of each row in descending order, of equal ones the lower id first."""

    logits_BC: Tensor
    ids_BC: Tensor
    known_BC: Tensor
    """False at the end of a row, where another token with the same logit may have been left out."""
    all: bool
    """Whether these are all tokens."""


def draw(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability (nats) at temperature 1, both (B,); logits are float32."""
    total_B = logits_BV.logsumexp(dim=-1)
    tokens_B = _sample(logits_BV, total_B, sampling, uniforms_B)
    return tokens_B, logits_BV.gather(1, tokens_B[:, None])[:, 0] - total_B


def _sample(logits_BV: Tensor, total_B: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    if sampling.temperature != 1:
        total_B = (logits_BV / sampling.temperature).logsumexp(dim=-1)
    tokens_B = torch.empty_like(uniforms_B, dtype=torch.long)
    rows_B = torch.arange(len(tokens_B), device=tokens_B.device)
    for size in (*_SIZES, logits_BV.shape[1]):
        found = _likeliest(logits_BV[rows_B] if len(rows_B) < len(logits_BV) else logits_BV, size)
        picked_B, sure_B = _pick(found, total_B[rows_B], sampling, uniforms_B[rows_B])
        tokens_B[rows_B] = picked_B
        rows_B = rows_B[~sure_B]
        if not len(rows_B):
            break
    return tokens_B


def _likeliest(logits_BV: Tensor, size: int) -> _Candidates:
    if size >= logits_BV.shape[1]:
        values_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        return _Candidates(values_BV, ids_BV, values_BV > -torch.inf, all=True)
    values_BC, ids_BC = logits_BV.topk(size, dim=-1)
    floor_B1 = values_BC[:, -1:]
    ids_BC, order_BC = ids_BC.sort(dim=-1)
    values_BC, again_BC = values_BC.gather(1, order_BC).sort(dim=-1, descending=True, stable=True)
    return _Candidates(values_BC, ids_BC.gather(1, again_BC), values_BC > floor_B1, all=False)


def _pick(
    found: _Candidates, total_B: Tensor, sampling: Sampling, uniforms_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The token at each uniform number, and whether it would be the same among all tokens."""
    hot_BC = found.logits_BC / sampling.temperature
    kept_BC = found.known_BC.clone()
    if sampling.top_k:
        # Among the k likeliest only these count towards the mass.
        kept_BC[:, sampling.top_k :] = False
        total_B = hot_BC.masked_fill(~kept_BC, -torch.inf).logsumexp(dim=-1)
    probs_BC = (hot_BC - total_B[:, None]).exp() * kept_BC
    up_to_BC = probs_BC.cumsum(dim=-1)
    if sampling.top_p < 1:
        kept_BC &= up_to_BC - probs_BC < sampling.top_p
    if sampling.min_p:
        kept_BC &= probs_BC >= sampling.min_p * probs_BC[:, :1]
    count_B1 = kept_BC.sum(dim=-1, keepdim=True).clamp(min=1)
    truncated = bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)
    mass_B1 = up_to_BC.gather(1, count_B1 - 1) if truncated or found.all else 1.0
    place_B1 = (up_to_BC <= uniforms_B[:, None] * mass_B1).sum(dim=-1, keepdim=True)
    # A uniform number that rounds to 1 falls off the end; the last token that is kept stands in.
    tokens_B = found.ids_BC.gather(1, place_B1.minimum(count_B1 - 1))[:, 0]
    known_B1 = found.known_BC.sum(dim=-1, keepdim=True)
    # Undecided: truncation may go on beyond what is known, or the place lies there.
    ends_B1 = (
        known_B1 >= sampling.top_k
        if sampling.top_k
        else known_B1 > (count_B1 if truncated else place_B1)
    )
    return tokens_B, ends_B1[:, 0] | found.all
