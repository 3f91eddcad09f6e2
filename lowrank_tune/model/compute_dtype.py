"""The dtype that a base computes in.

Of a repository that is quantized already, transformers leaves the other weights in the dtype that they were saved in,
and bitsandbytes multiplies in the dtype that its configuration names, which is often fp16. Activations that fit bf16
can overflow there.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit


def set_compute_dtype(model: Any, dtype: torch.dtype) -> None:
    """Makes all 4-bit modules multiply in `dtype`."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True


def cast_other_weights(model: Any, dtype: torch.dtype) -> None:
    """Casts all weights that are not packed in 4 bits, except those that the model's class keeps in fp32."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        # Packed weights can be stored as floating-point numbers.
        is_packed = isinstance(parameter, Params4bit) or not parameter.is_floating_point()
        if not is_packed and kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
