"""Frozen bases of true shapes in NF4 on the fake GPU, made in a second because their weights have no numbers."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from gpu_proof.base import SHAPES, config_of
from kernel_counter import CUDA
from kernel_work import BLOCK, NESTED_BLOCK
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM

from lowrank_tune.model.base import Base, freeze_base, nf4_config

DTYPE = torch.bfloat16


def fake_base(shape: str, layers: int | None = None) -> Base:
    """Returns the base of a shape (`gpu_proof.base.SHAPES`), with all or with few of its layers, as `load_base` would
    make it. Enter `fake_gpu` first."""
    config = config_of(shape)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    with _disable_current_modes(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=DTYPE)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        parent, _, attribute = name.rpartition(".")
        if isinstance(module, nn.Linear) and module is not head:
            setattr(model.get_submodule(parent), attribute, _quantized_linear(module))
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # Rotary frequencies are computed, not loaded.
            with _disable_current_modes():
                computed = type(module)(config=config)
            setattr(model.get_submodule(parent), attribute, computed.to(CUDA))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, _frozen(parameter.shape, DTYPE))
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.quantization_config = nf4_config(CUDA)
    return freeze_base(
        model,
        None,
        name=SHAPES[shape],
        bits=4,
    )


def _frozen(shape: Any, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(_empty(shape, dtype), requires_grad=False)


def _empty(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def _quantized_linear(linear: nn.Linear) -> Any:
    """Returns a `Linear4bit` whose weight is a plain parameter with a quantization state: `Params4bit` cannot hold a
    tensor without numbers."""
    with _disable_current_modes():
        layer = bitsandbytes.nn.Linear4bit(
            8,
            8,
            bias=False,
            compute_dtype=DTYPE,
            compress_statistics=True,
            quant_type="nf4",
            device=torch.device("meta"),
        )
    layer.in_features = linear.in_features
    layer.out_features = linear.out_features
    size = linear.weight.numel()
    weight: Any = _frozen((size // 2, 1), torch.uint8)
    weight.quant_state = layer.quant_state = _quant_state(linear.weight.shape)
    weight.compress_statistics = True
    weight.quant_type = "nf4"
    weight.bnb_quantized = True
    weight.quant_storage = torch.uint8
    weight.blocksize = BLOCK
    layer._parameters["weight"] = weight
    if linear.bias is not None:
        layer.bias = _frozen(linear.bias.shape, DTYPE)
    return layer


def _quant_state(shape: torch.Size) -> QuantState:
    blocks = shape.numel() // BLOCK
    nested = QuantState(
        absmax=_empty(blocks // NESTED_BLOCK, torch.float32),
        shape=None,
        code=_empty(256, torch.float32),
        blocksize=NESTED_BLOCK,
        quant_type=None,
        dtype=torch.float32,
    )
    return QuantState(
        absmax=_empty(blocks, torch.uint8),
        shape=shape,
        code=_empty(16, torch.float32),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=DTYPE,
        offset=_empty((), torch.float32),
        state2=nested,
    )
