"""What the user should know about the architecture of a base: experts that stay in 16 bits, layers that keep a state
instead of keys and values, kernels that are not installed, and activations that exceed float16."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from lowrank_tune.model.base import Base, default_dtype, num_stored_bytes

GIB = 1 << 30
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR_ATTENTION_MODULE = "fla"
LINEAR_ATTENTION_PACKAGE = "flash-linear-attention"
LINEAR_ATTENTION_TYPES = ("qwen3_5", "qwen3_next", "olmo_hybrid", "kimi_linear")
"""Beginnings of the model types whose layers with linear attention have kernels in that package."""
FP16_OVERFLOW_MODEL_TYPES = ("gemma2", "gemma3", "gemma4")
"""Beginnings of model types whose published weights are known to produce activations above 65,504."""


def expert_bytes(model: nn.Module) -> int:
    """Returns the bytes of experts that are stored as one tensor for all experts of a layer, which bitsandbytes does
    not quantize."""
    total = 0
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and parameter.is_floating_point():
                total += parameter.nbytes
    return total


def has_recurrent_layers(config: Any) -> bool:
    """Returns whether some layers keep a state of what they have read in place of keys and values."""
    layers = DynamicCache(config=config.get_text_config()).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def missing_kernels(config: Any) -> str | None:
    """Returns the package with the kernels of the model's linear attention if it is not installed."""
    model_type = config.get_text_config().model_type
    if model_type.startswith(LINEAR_ATTENTION_TYPES) and find_spec(LINEAR_ATTENTION_MODULE) is None:
        return LINEAR_ATTENTION_PACKAGE
    return None


def experts_note(
    num_bytes: int,
    total_bytes: int,
    dtype: torch.dtype,
) -> str:
    """Returns the sentence about experts that are not quantized."""
    share = num_bytes / total_bytes
    return (
        f"the experts stay in {8 * dtype.itemsize} bits: {num_bytes / GIB:.2f} GiB, {share:.0%} of the base's bytes; "
        "bitsandbytes quantizes linear modules, and the experts of a layer are one tensor"
    )


def recurrent_note(model_type: str) -> str:
    """Returns the sentence about layers that keep a state."""
    return (
        f"{model_type} layers keep a state in place of keys and values: rows are padded, beginnings that rows share "
        "are computed for each row, and completions are drawn without the kit's own cache"
    )


def architecture_notes(base: Base) -> Iterator[str]:
    """Yields what the user should know before a run."""
    config = base.model.config
    experts = expert_bytes(base.model)
    if base.bits == 4 and experts:
        yield experts_note(
            experts,
            sum(map(num_stored_bytes, base.model.parameters())),
            base.dtype,
        )
    if has_recurrent_layers(config):
        yield recurrent_note(config.model_type)


def architecture_warnings(base: Base) -> Iterator[str]:
    """Yields what makes a run slow or wrong."""
    config = base.model.config
    package = missing_kernels(config)
    if package is not None and base.device.type == "cuda":
        yield (
            f"{package} is not installed: {config.model_type} layers run transformers' slow code for linear attention; "
            f"pip install {package}"
        )
    if base.dtype == torch.bfloat16 and default_dtype(base.device) == torch.float16:
        yield "this GPU has no bfloat16 and emulates it, which is slow; leave out `base.dtype`"
    if base.dtype == torch.float16 and config.model_type.startswith(FP16_OVERFLOW_MODEL_TYPES):
        yield (
            f"activations of {config.model_type} models are known to exceed float16: the loss may not be finite; "
            "use a GPU with bfloat16, or `base.dtype: float32`"
        )
