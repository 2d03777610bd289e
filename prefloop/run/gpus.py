"""GPUs that an estimate can be for, by their makers' figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Gpu(NamedTuple):
    """The makers' dense peak figures."""

    tflops: float
    """bfloat16 products, TFLOP/s."""
    bandwidth: float
    """GB/s."""


GPUS: Mapping[str, Gpu] = {
    "4090": Gpu(165, 1008),
    "A100": Gpu(312, 2039),
    "A10G": Gpu(70, 600),
    "H100": Gpu(989, 3350),
    "H200": Gpu(989, 4800),
    "L20": Gpu(119.5, 864),
    "L4": Gpu(121, 300),
    "L40S": Gpu(362, 864),
}
