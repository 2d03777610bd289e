"""Attention of a step's tokens over slots on CPUs, by a small C function: attention.c.

torch has no product that reads keys of many lengths where they lie, once for all the query heads that share them
(docs/decisions/0022-attention-in-c.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prefloop.generate.cpu.compiled import c_functions

# N tokens of a step, S slots, K key/value heads, G query heads for each of those, C positions of a slot, D head
# dimension.

_WHOLE = 2**31 - 1
"""A window that no conversation exceeds."""


def attend(
    query_NHD: Tensor,
    new: tuple[Tensor, Tensor],
    store: tuple[Tensor, Tensor],
    at: tuple[Tensor, Tensor],
    *,
    window: int | None,
    scale: float,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """Write keys and values `new`, each (N, K, D), to `store`, each (S, K, C, D), at slots and positions, and attend.

    With `rotary`, cosines and sines (N, D), queries and new keys are turned to their positions first. Returns
    (N, H, D), or None where nothing was done, as no compiled function serves these tensors. Slots and positions
    are int64 and lie within `store`. Raises RuntimeError for want of memory.
    """
    if not _alike(query_NHD, new, store, rotary or ()):
        return None
    _, K, C, D = store[0].shape
    N, H, _ = query_NHD.shape
    function = _compiled(D, H // K, query_NHD.dtype)
    if function is None:
        return None
    out_NHD = torch.empty_like(query_NHD, memory_format=torch.contiguous_format)
    rows = [_in_rows(part) for part in (query_NHD, *new)]
    turned = [part.contiguous() for part in rotary or ()]
    pointers = [part.data_ptr() for part in (*at, *rows, *store, *turned)]
    pointers += [0] * (2 - len(turned))
    sizes = torch.get_num_threads(), N, K, C, window or _WHOLE, scale
    if function(*sizes, *(part.stride(0) for part in rows), *pointers, out_NHD.data_ptr()):
        raise RuntimeError("can't allocate memory for a step's attention")
    return out_NHD


@cache
def _compiled(D: int, G: int, dtype: torch.dtype) -> Callable[..., int] | None:
    """The C function for these shapes; None where it cannot be had."""
    found = c_functions("attention", dtype, D=D, G=G)
    if found is None:
        return None
    sizes: list[Any] = [ctypes.c_int, *[ctypes.c_long] * 4, ctypes.c_float, *[ctypes.c_long] * 3]
    found.attend.argtypes = sizes + [ctypes.c_void_p] * 10
    function: Callable[..., int] = found.attend
    return function


def is_compiled(D: int, G: int, dtype: torch.dtype) -> bool:
    """Whether `attend` serves heads of this dimension, G for each key/value head."""
    return _compiled(D, G, dtype) is not None


def _in_rows(part_NKD: Tensor) -> Tensor:
    """The tensor with each token's heads one after the other, as they often are; rows may lie apart."""
    in_rows = part_NKD.stride()[1:] == (part_NKD.shape[2], 1)
    return part_NKD if in_rows else part_NKD.contiguous()


def _alike(
    query_NHD: Tensor,
    new: tuple[Tensor, Tensor],
    store: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, ...],
) -> bool:
    """Whether all are on the CPU, of one dtype and of shapes that belong together: C reads what it is told is there."""
    _, K, _, D = store[0].shape
    N, H, _ = query_NHD.shape
    return (
        all(
            part.device.type == "cpu" and part.dtype == query_NHD.dtype
            for part in (*new, *store, *rotary)
        )
        and store[1].shape == store[0].shape
        and store[0].is_contiguous()
        and store[1].is_contiguous()
        and all(part.shape == (N, K, D) for part in new)
        and all(part.shape == (N, D) for part in rotary)
        and query_NHD.shape == (N, H, D)
        and H % K == 0
        and (not rotary or D % 2 == 0)
    )
