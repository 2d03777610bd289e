"""What tests of the compiled functions need."""

from __future__ import annotations

import shutil

import pytest

needs_c_compiler = pytest.mark.skipif(
    not (shutil.which("gcc") or shutil.which("clang")), reason="no C compiler: gcc or clang"
)
