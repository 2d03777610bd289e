"""Memory: the C allocator told to keep what it frees, and how its lack is told from other errors."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# mallopt's parameters (glibc, malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning each to the kernel.

    Forward passes allocate and free the same tens of megabytes over and over; faulting their pages in
    again cost a fifth to a third of the time on the CPUs where this was measured. Does nothing elsewhere.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 * 2**20)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory; on CPUs only the message says so."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def instead_of_running_out(error: Exception) -> Iterator[None]:
    """Inside, `error` is raised in place of torch's words for want of memory."""
    try:
        yield
    except RuntimeError as raised:
        if not is_out_of_memory(raised):
            raise
        raise error from raised
