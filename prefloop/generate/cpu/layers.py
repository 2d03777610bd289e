"""Decoder layers of Llama's form as four products and a few passes of C, on CPUs: rows.c, attention.c.

torch computes norms, rotary embeddings, SiLU and residuals by some 35 operations a layer, each of which reads and
writes all rows. Here queries, keys and values are one product, gate and up are another, and what lies between
products is one pass (docs/decisions/0024-layers-in-c.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloop.generate.cpu import attention
from prefloop.generate.cpu.compiled import c_functions
from prefloop.generate.cpu.products import Product, Reordered, is_hooked, product_of, stacked

# N tokens of a step, I features of a row, F features inside the MLP, H query heads, K key/value heads, D head dimension.

# Classes of transformers' models whose layers are computed as below, with where their window stands.
_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: attention.config.sliding_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
}


class _Norm(NamedTuple):
    weight_I: Tensor
    epsilon: float


class FusedLayer:
    """A decoder layer's forward pass over the tokens of a step; over anything else it is the layer's own."""

    def __init__(self, layer: Any, products: list[Product]) -> None:
        """`products`: of q, k, v, o, gate, up and down."""
        query, key, value, output, gate, up, down = products
        self._layer, self._attention = layer, layer.self_attn
        self._qkv = Reordered(stacked([query, key, value]))
        self._output = Reordered(output)
        self._gate_up = Reordered(stacked([gate, up]))
        self._down = Reordered(down)
        self._norms = [_norm_of(layer.input_layernorm), _norm_of(layer.post_attention_layernorm)]
        self._window = _WINDOWS[type(layer).__name__](layer.self_attn)

    def __call__(self, hidden_1NI: Tensor, **options: Any) -> Tensor:
        """`hidden_1NI` (1, N, I) is changed in place, and returned; `options` are the layer's own, and the step."""
        step, (cosines, sines) = options.get("step"), options["position_embeddings"]
        if step is None or not self._fits(hidden_1NI, cosines):
            usual: Tensor = type(self._layer).forward(self._layer, hidden_1NI, **options)
            return usual
        hidden_NI, D = hidden_1NI[0], self._attention.head_dim
        first, second = self._norms
        heads_NHD = self._qkv(norm(hidden_NI, None, first)).view(len(hidden_NI), -1, D)
        K = heads_NHD.shape[1] // (self._attention.num_key_value_groups + 2)
        query_NHD, keys_NKD = heads_NHD[:, : -2 * K], heads_NHD[:, -2 * K : -K]
        out_NHD = attention.attend(
            query_NHD,
            (keys_NKD, heads_NHD[:, -K:]),
            step.slots.layer(self._attention.layer_idx, K, D, hidden_NI),
            (step.slots_N, step.positions_N),
            window=self._window,
            scale=self._attention.scaling,
            rotary=(cosines[0], sines[0]),
        )
        assert out_NHD is not None
        inside_NI = norm(hidden_NI, self._output(out_NHD.flatten(1)), second)
        hidden_NI += self._down(silu_times(self._gate_up(inside_NI)))
        return hidden_1NI

    def _fits(self, hidden_1NI: Tensor, cosines: Tensor) -> bool:
        """Whether rows have the weights' dtype, and heads are turned whole: C reads what it is told is there."""
        return (
            hidden_1NI.dtype == self._norms[0].weight_I.dtype
            and cosines.dtype == hidden_1NI.dtype
            and cosines.shape[-1] == self._attention.head_dim
        )


def fused(layer: Any) -> FusedLayer | None:
    """The layer in this form; None where it is not of Llama's form, is hooked, or C cannot be had."""
    if (
        type(layer).__name__ not in _WINDOWS
        or not type(layer).__module__.startswith("transformers.models.")
        or any("forward" in part.__dict__ for part in (layer, layer.self_attn, layer.mlp))
        or any(map(is_hooked, layer.modules()))
    ):
        return None
    block, mlp = layer.self_attn, layer.mlp
    linears = [block.q_proj, block.k_proj, block.v_proj, block.o_proj]
    products = [product_of(part) for part in (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    dtype = norms[0].weight.dtype
    if (
        any(product is None or product.weight_OW.dtype != dtype for product in products)
        or any(not _is_rms_norm(part, dtype) for part in norms)
        or type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation")
        or block.head_dim % 2
        or _rows(dtype) is None
        or not attention.is_compiled(block.head_dim, block.num_key_value_groups, dtype)
    ):
        return None
    return FusedLayer(layer, [product for product in products if product is not None])


def _is_rms_norm(part: nn.Module, dtype: torch.dtype) -> bool:
    weight = getattr(part, "weight", None)
    return (
        type(part).__name__.endswith("RMSNorm")
        and "forward" not in part.__dict__
        and weight is not None
        and weight.dtype == dtype
        and weight.device.type == "cpu"
    )


def _norm_of(part: Any) -> _Norm:
    return _Norm(part.weight.detach().contiguous(), part.variance_epsilon)


def norm(hidden_NI: Tensor, added_NI: Tensor | None, by: _Norm) -> Tensor:
    """Root mean square norm of rows to which `added_NI` is added first, in place."""
    assert hidden_NI.is_contiguous()
    assert added_NI is None or added_NI.is_contiguous()
    out_NI = torch.empty_like(hidden_NI)
    added = 0 if added_NI is None else added_NI.data_ptr()
    rows = _rows(hidden_NI.dtype)
    assert rows is not None
    rows.norm(
        torch.get_num_threads(), *hidden_NI.shape, by.epsilon,
        hidden_NI.data_ptr(), added, by.weight_I.data_ptr(), out_NI.data_ptr(),
    )  # fmt: skip
    return out_NI


def silu_times(gate_up_NF: Tensor) -> Tensor:
    """SiLU(gate) * up, (N, F), of gate and up side by side, (N, 2F)."""
    N, F = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
    out_NF = gate_up_NF.new_empty(N, F)
    rows = _rows(gate_up_NF.dtype)
    assert rows is not None
    assert gate_up_NF.is_contiguous()
    rows.silu_times(torch.get_num_threads(), N, F, gate_up_NF.data_ptr(), out_NF.data_ptr())
    return out_NF


@cache
def _rows(dtype: torch.dtype) -> ctypes.CDLL | None:
    found = c_functions("rows", dtype)
    if found is None:
        return None
    sizes: list[Any] = [ctypes.c_int, *[ctypes.c_long] * 2]
    found.norm.argtypes = [*sizes, ctypes.c_float, *[ctypes.c_void_p] * 4]
    found.silu_times.argtypes = sizes + [ctypes.c_void_p] * 2
    return found
