"""A key/value cache and an attention function made for decoding one token at a time.

transformers' DynamicCache copies itself at every token, and its SDPA call is slow for a single query
with a mask on CPUs; both are replaced through transformers' own extension points.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# B rows, H query heads, K key/value heads, T positions, D head dimension.

ATTENTION = "prefloop_decode"


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A DynamicLayer that writes into room reserved ahead instead of concatenating."""

    def __init__(self, capacity: int) -> None:
        """`capacity` is the number of positions reserved: prompt and new tokens."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D) states; returns views of everything so far."""
        if not self.is_initialized:
            shape = (*key_states.shape[:2], self.capacity, key_states.shape[3])
            self.lazy_initialization(key_states, value_states)
            self._keys = key_states.new_empty(shape)
            self._values = value_states.new_empty((*shape[:3], value_states.shape[3]))
        old = self.get_seq_length()
        new = old + key_states.shape[2]
        self._keys[:, :, old:new] = key_states
        self._values[:, :, old:new] = value_states
        self.keys, self.values = self._keys[:, :, :new], self._values[:, :, :new]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        length = self.get_seq_length()
        self._keys, self._values = self._keys[indices], self._values[indices]
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]


def reserve(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """A cache for `capacity` positions; layers that are not plain attention keep their own kind."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        GrowingLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row without repeating keys for grouped queries; SDPA otherwise.

    query (B, H, 1, D), key and value (B, K, T, D); returns (B, 1, H, D).
    """
    B, H, T_new, D = query.shape
    if T_new != 1 or query.device.type != "cpu" or kwargs.get("position_bias") is not None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return result
    K, T = key.shape[1], key.shape[2]
    grouped_BKGD = query.view(B, K, H // K, D)
    scores = torch.matmul(grouped_BKGD, key.transpose(2, 3)).float()
    scores *= D**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        mask = attention_mask[..., :T]
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, torch.finfo(torch.float32).min)
        else:
            scores += mask
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.matmul(weights, value).view(B, 1, H, value.shape[3]), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients and, for models on SDPA, the attention above; all undone at the end."""
    config, training = model.config, model.training
    before = config._attn_implementation
    model.train(False)
    if before == "sdpa":
        config._attn_implementation = ATTENTION
    try:
        with torch.inference_mode():
            yield
    finally:
        config._attn_implementation = before
        model.train(training)
