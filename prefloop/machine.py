"""What a run notes about its machine: versions, memory, time."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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
