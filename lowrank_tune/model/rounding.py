"""Differences between two computations of the same hidden states that rounding explains.

In half precision another batch shape alone selects other kernels, and a deep model amplifies their rounding: on an
H200, one row of Llama-3.1-8B (random weights, NF4) differs by 6 to 7 % from the same row in a batch of three. A fixed
tolerance would reject correct fast paths there.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 2.0
"""A fast path may differ by this multiple of what another batch shape alone changes."""
LARGEST = 0.25
"""No measured rounding allows a relative difference above this one."""


def relative_difference(computed: Tensor, expected: Tensor) -> float:
    """Returns |computed - expected| / |expected| over all elements, in fp32."""
    difference = torch.linalg.vector_norm(computed.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float()))


def allowed_difference(tolerance: float, rounding: float) -> float:
    """Returns the relative difference that a fast path may have: `tolerance`, or more if the measured `rounding` is
    larger."""
    return max(tolerance, min(SLACK * rounding, LARGEST))
