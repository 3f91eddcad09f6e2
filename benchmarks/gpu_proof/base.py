"""A quantized base of a true shape with random weights, built one linear at a time on the device: the 16-bit whole
never exists."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_tune.model import configs
from lowrank_tune.model.base import Base, freeze_base, nf4_config

SHAPES = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
}
"""The true shapes by name: bases whose `config.json` the package contains."""
TINY = "tiny"
TINY_CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


def config_of(shape: str) -> Any:
    """Return the configuration of a true shape, or of `tiny`."""
    config = TINY_CONFIG if shape == TINY else configs.config_of(SHAPES[shape])
    assert config is not None, f"the package contains no config.json of {shape}"
    return AutoConfig.for_model(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | config)


def random_base(shape: str, device: torch.device, bf16: bool = False) -> Base:
    """Build the frozen base of a shape, without a tokenizer. `bf16` computes as on a GPU, also without one."""
    dtype = torch.bfloat16 if bf16 or device.type == "cuda" else torch.float32
    model = build_model(config_of(shape), device, dtype)
    return freeze_base(model, tokenizer=None, name=SHAPES.get(shape, shape), bits=4)


def build_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a quantized model of random numbers on `device`. Linears other than the head become NF4."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        parent, _, attribute = name.rpartition(".")
        if isinstance(module, nn.Linear) and module is not head:
            setattr(model.get_submodule(parent), attribute, quantized_linear(module, dtype, device, generator))
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # Rotary frequencies are computed, not loaded, so the module is created again on the device.
            with device:
                setattr(model.get_submodule(parent), attribute, type(module)(config=config))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                # Norm weights are the only vectors left here; the matrices are the embedding and the head.
                values.fill_(1.0) if values.ndim == 1 else values.normal_(0.0, 0.02, generator=generator)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), "a tensor has no values"
    model.is_loaded_in_4bit = model.is_quantized = True  # what PEFT reads to choose its 4-bit LoRA layer
    model.config.quantization_config = nf4_config(device)
    return model


def quantized_linear(
    linear: nn.Linear, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> bitsandbytes.nn.Linear4bit:
    """Return a `Linear4bit` (NF4, double quantization) of the same shape with random weights."""
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device=torch.device("meta"),
    )
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
    quantized = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    layer.weight = quantized.to(device)
    if linear.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=device), requires_grad=False)
    return layer
