"""C functions of this folder, compiled by the machine's C compiler when a process first needs them, in some tenths of a second."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC",
)  # fmt: skip
_COMPILE_SECONDS = 60


@cache
def c_functions(name: str, dtype: torch.dtype, **values: int) -> ctypes.CDLL | None:
    """`name`.c for activations of this dtype, with `values` defined; None without a compiler, or where it cannot be loaded."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    defined = {**values, "BFLOAT16": int(dtype == torch.bfloat16)}
    try:
        with tempfile.TemporaryDirectory(prefix="prefloop-") as folder:
            made = Path(folder) / f"{name}.so"
            command = [
                *_compiler(),
                *_FLAGS,
                *(f"-D{key}={value}" for key, value in defined.items()),
            ]
            command += [str(_FOLDER / f"{name}.c"), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_SECONDS)
            # A loaded library stays when its file is gone.
            return ctypes.CDLL(str(made))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        named = os.environ.get("CC")
        remedy = f"; CC is {named}: name a C compiler that works here, or unset CC" if named else ""
        log.log(
            logging.WARNING if named else logging.INFO,
            "torch does the work of %s.c, more slowly, as it cannot be had: %s%s", name, error, remedy,
        )  # fmt: skip
        return None


def _compiler() -> list[str]:
    """The command of the C compiler: $CC, gcc or clang. Raises ValueError, OSError."""
    if named := shlex.split(os.environ.get("CC", "")):
        return named
    for name in ("gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise OSError("no gcc or clang on this machine")
