"""What a process knows of its machine: versions, time, memory, and a bar for whoever watches."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_VERSIONS = ("prefloop", "torch", "transformers", "peft", "accelerate", "datasets", "sacrebleu")


def environment() -> dict[str, Any]:
    """Versions and machine, as they were when the run began."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor_count": os.cpu_count(),
        "versions": installed_versions(),
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    return dict(_versions())


@cache
def _versions() -> Mapping[str, str]:
    """Looked up once a process: every stage of a run notes them."""
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_mb() -> float:
    """The most memory (MiB) that this process, or the largest of those that it has ended, ever held.

    On a GPU what torch had allocated there comes on top.
    """
    sizes = [
        resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    held = max(sizes) * (1 if sys.platform == "darwin" else 1024)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        held += torch.cuda.max_memory_allocated()
    return round(held / 2**20, 1)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time, to a tenth of a second."""
        return round(time.perf_counter() - self._start, 1)


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


def multiplies_bfloat16_fast() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX512-BF16 or AMX), as torch tells it.

    oneDNN says yes to every CPU with AVX-512 and emulates them there, slower than float32; other CPUs' (Arm) were
    never measured.
    """
    import torch

    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    told = [getattr(torch.cpu, name, None) for name in names]
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(has() for has in told if has)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory; on CPUs only the message says so."""
    import torch  # what only asks for versions and times need not wait for it

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def raise_on_out_of_memory(error: Exception) -> Iterator[None]:
    """Inside, `error` is raised in place of torch's words for want of memory."""
    try:
        yield
    except RuntimeError as raised:
        if not is_out_of_memory(raised):
            raise
        raise error from raised


class Bar:
    """Progress of one job. Shows nothing when standard error is no terminal, or inside another bar."""

    hidden: ClassVar[bool] = False
    """Whether no bar is shown, wherever standard error goes."""
    _shown: ClassVar[int] = 0

    def __init__(self, label: str, total: int | None, unit: str = "tok") -> None:
        """`total` counts items (answers, steps), if known; `unit` names what `advance` is told besides."""
        console = Console(stderr=True)
        self._unit = unit
        self._amount = 0
        self._start = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}{task.fields[of]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=Bar.hidden or not console.is_terminal,
        )
        of = "" if total is None else f"/{total}"
        self._task = self._progress.add_task(label, total=total, speed="", of=of)

    def advance(self, items: int = 0, amount: int = 0) -> None:
        """`items` more are done, at the cost of `amount` units."""
        self._amount += amount
        speed = self._amount / max(time.perf_counter() - self._start, 1e-9)
        self._progress.update(
            self._task, advance=items, speed=f"{speed:,.0f} {self._unit}/s" if self._amount else ""
        )

    def at(self, items: int) -> None:
        """So many items are done in all, by whoever does them."""
        self._progress.update(self._task, completed=items)

    def __enter__(self) -> Bar:
        if not Bar._shown:
            self._progress.start()
        Bar._shown += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        Bar._shown -= 1
        if not Bar._shown:
            self._progress.stop()
