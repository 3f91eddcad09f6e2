"""`F.rms_norm` as the one kernel that torch launches on a GPU, where it has the dtype of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from kernel_work import Work, num_stored_bytes
from torch import Tensor

_plain_norm = F.rms_norm


def make_fake_rms_norm(counters: Sequence[Any]) -> Any:
    """Returns the function for tensors on the fake GPU, which counts for the last of the counters."""

    def fake_rms_norm(
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        # Autocast computes it in fp32, and the fused kernel has one dtype.
        is_fused = x.is_cuda and not torch.is_autocast_enabled("cuda")
        if not is_fused or (weight is not None and weight.dtype != x.dtype):
            return _plain_norm(x, normalized_shape, weight, eps)
        if not x.is_contiguous():
            x = x.contiguous()
        counter = counters[-1]
        with counter.counting():
            output = _plain_norm(x, normalized_shape, weight, eps)
        num_bytes = 2 * num_stored_bytes(x)
        if weight is not None:
            num_bytes += num_stored_bytes(weight)
        counter.add("rms_norm", Work("elementwise", num_bytes))
        return output

    return fake_rms_norm
