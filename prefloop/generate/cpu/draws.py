"""What a draw must know of a step's logits, by a C function that reads each row once: draws.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloop.generate.cpu.compiled import c_functions

# B rows, V vocabulary, C candidates.


class Survey(NamedTuple):
    """Of each row of logits, float32."""

    total_B: Tensor
    """log sum exp."""
    scaled_B: Tensor
    """log sum exp of the logits divided by the temperature."""
    logits_BC: Tensor
    """The greatest, in descending order; of equal ones the lower token first."""
    ids_BC: Tensor


def survey(logits_BV: Tensor, temperature: float, size: int) -> Survey | None:
    """What a draw needs, with `size` candidates a row; None where no compiled function serves.

    `temperature` is above 0. Raises RuntimeError for want of memory.
    """
    B, V = logits_BV.shape
    if logits_BV.device.type != "cpu" or logits_BV.dtype != torch.float32 or not 0 < size < V:
        return None
    function = _compiled()
    if function is None:
        return None
    logits_BV = logits_BV.contiguous()
    found = Survey(
        logits_BV.new_empty(B),
        logits_BV.new_empty(B),
        logits_BV.new_empty(B, size),
        torch.empty(B, size, dtype=torch.int64),
    )
    pointers = (part.data_ptr() for part in (logits_BV, *found))
    if function(torch.get_num_threads(), B, V, size, 1 / temperature, *pointers):
        raise RuntimeError("can't allocate memory for a step's draws")
    return found


@cache
def _compiled() -> Callable[..., int] | None:
    found = c_functions("draws", torch.float32)
    if found is None:
        return None
    sizes: list[Any] = [ctypes.c_int, *[ctypes.c_long] * 3, ctypes.c_float]
    found.survey.argtypes = sizes + [ctypes.c_void_p] * 5
    function: Callable[..., int] = found.survey
    return function
