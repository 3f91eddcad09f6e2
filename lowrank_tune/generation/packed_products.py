"""Which products with a 4-bit weight bitsandbytes computes from the packed weight. For the others it unpacks the weight
in each call, which takes longer than the product of a few rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

MAX_PACKED_ROWS = 8
"""Rows up to which a weight is read packed, where bitsandbytes' own choice is not known."""
CUDA_KERNELS = "bitsandbytes.backends.cuda.ops"
BLOCK = 64
"""Weights that share a scale: the packed kernel needs a multiple of them as inputs."""


def reads_packed_weight(
    rows: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Returns whether a product of `rows` rows with a weight (outputs, inputs) reads it packed on this device."""
    choose = None
    if device.type == "cuda" and torch.cuda.is_available():
        choose = _own_choice()
    if choose is None:
        return rows <= MAX_PACKED_ROWS
    return inputs % BLOCK == 0 and choose(device.index or 0, dtype, rows, outputs, inputs)


@cache
def _own_choice() -> Callable[[int, torch.dtype, int, int, int], bool] | None:
    """Returns bitsandbytes' choice of a kernel, None if this version has another one."""
    try:
        kernels: Any = importlib.import_module(CUDA_KERNELS)
        most_rows = int(kernels._gemm_4bit_custom_max_m)
        choose = kernels._gemm_4bit_use_custom_fn
    # Its import raises what a missing library raises.
    except Exception:
        return None

    def own_choice(
        device: int,
        dtype: torch.dtype,
        rows: int,
        outputs: int,
        inputs: int,
    ) -> bool:
        return rows <= most_rows and bool(choose(device, dtype, rows, outputs, inputs))

    return own_choice
