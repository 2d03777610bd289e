"""Attention of a step's tokens over slots on CPUs, by a small C function: slot_attention.c.

torch has no product that reads keys of many lengths where they lie, once for all the query heads that share them
(docs/decisions/0022-attention-in-c.md). The function is compiled by the machine's C compiler for the model's shape
when a process first needs it, in some tenths of a second.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# N tokens of a step, S slots, K key/value heads, G query heads for each of those, C positions of a slot, D head
# dimension.

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("slot_attention.c")
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC",
)  # fmt: skip
_COMPILE_SECONDS = 60
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
) -> Tensor | None:
    """Write keys and values `new`, each (K, N, D), to `store`, each (S, K, C, D), at slots and positions, and attend.

    Returns (N, H, D), or None where nothing was done, as no compiled function serves these tensors. Slots and positions
    are int64 and lie within `store`. Raises RuntimeError for want of memory.
    """
    if not _alike(query_NHD, new, store):
        return None
    _, K, C, D = store[0].shape
    N, H, _ = query_NHD.shape
    function = _compiled(D, H // K, query_NHD.dtype)
    if function is None:
        return None
    out_NHD = torch.empty_like(query_NHD, memory_format=torch.contiguous_format)
    new_NKD = (each_KND.transpose(0, 1) for each_KND in new)
    tensors = [tensor.contiguous() for tensor in (*at, query_NHD, *new_NKD, *store, out_NHD)]
    sizes = torch.get_num_threads(), N, K, C, window or _WHOLE, scale
    failed = function(*sizes, *(tensor.data_ptr() for tensor in tensors))
    if failed:
        raise RuntimeError("can't allocate memory for a step's attention")
    return out_NHD


def _alike(query_NHD: Tensor, new: tuple[Tensor, Tensor], store: tuple[Tensor, Tensor]) -> bool:
    """Whether all are on the CPU, of one dtype and of shapes that belong together: C reads what it is told is there."""
    _, K, _, D = store[0].shape
    N, H, _ = query_NHD.shape
    return (
        all(part.device.type == "cpu" and part.dtype == query_NHD.dtype for part in (*new, *store))
        and store[1].shape == store[0].shape
        and all(part.shape == (K, N, D) for part in new)
        and query_NHD.shape == (N, H, D)
        and H % K == 0
    )


@cache
def _compiled(D: int, G: int, dtype: torch.dtype) -> Callable[..., int] | None:
    """The C function for these shapes; None without a compiler, or where it cannot be loaded."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    values = {"D": D, "G": G, "BFLOAT16": int(dtype == torch.bfloat16)}
    defined = [f"-D{name}={value}" for name, value in values.items()]
    try:
        with tempfile.TemporaryDirectory(prefix="prefloop-") as folder:
            library = Path(folder) / "slot_attention.so"
            command = [*_compiler(), *_FLAGS, *defined, str(_SOURCE), "-o", str(library), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_SECONDS)
            # A loaded library stays when its file is gone.
            function = ctypes.CDLL(str(library)).attend
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.info("attention is computed by torch, as its C function cannot be had: %s", error)
        return None
    sizes: list[Any] = [ctypes.c_int, *[ctypes.c_long] * 4, ctypes.c_float]
    function.argtypes = sizes + [ctypes.c_void_p] * 8
    function.restype = ctypes.c_int
    found: Callable[..., int] = function
    return found


def _compiler() -> list[str]:
    """The command of the C compiler: $CC, gcc or clang. Raises ValueError, OSError."""
    if named := shlex.split(os.environ.get("CC", "")):
        return named
    for name in ("gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise OSError("no gcc or clang on this machine")
