"""A quantised base of a true shape with random weights, made one linear at a time on the device: the 16-bit whole never exists."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import bitsandbytes
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_tune.model import shapes
from lowrank_tune.model.base import Base, freeze, nf4

SHAPES = {"llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct", "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct", "qwen3-8b": "Qwen/Qwen3-8B",
          "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3"}  # fmt: skip
"""The true shapes by name: the bases whose `config.json` the package carries."""
TINY = "tiny"
SMALL: dict[str, Any] = dict(model_type="qwen2", hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=512, rms_norm_eps=1e-6, max_position_embeddings=1024,
                             rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False)  # fmt: skip


def config_of(shape: str) -> Any:
    """The configuration of a true shape, or of `tiny`."""
    found = SMALL if shape == TINY else shapes.config_of(SHAPES[shape])
    assert found is not None, f"the package carries no config.json of {shape}"
    return AutoConfig.for_model(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | found)


class HalfOnCpu(Base):
    """A base on the CPU that computes as one on a card does: bf16 weights under bf16 autocast."""

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)


def random_base(shape: str, device: torch.device, bf16: bool = False) -> Base:
    """The frozen base of a shape, without a tokenizer. `bf16`: compute as on a card, also without one."""
    dtype = torch.bfloat16 if bf16 or device.type == "cuda" else torch.float32
    base = freeze(build_model(config_of(shape), device, dtype), tokenizer=None, name=SHAPES.get(shape, shape), bits=4)
    return base if device.type == "cuda" or not bf16 else HalfOnCpu(**vars(base))


def build_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A quantised model made of random numbers, one linear at a time on the device: the 16-bit whole never exists."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantised_linear(module, dtype, device, generator))
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # Rotary frequencies: they are computed, not loaded, so the module is made anew on the device.
            parent, _, last = name.rpartition(".")
            with device:
                setattr(model.get_submodule(parent), last, type(module)(config=config))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                fresh = torch.empty(parameter.shape, dtype=dtype, device=device)
                # Norm weights are the only vectors left here; the matrices are the embedding and the head.
                fresh.fill_(1.0) if fresh.ndim == 1 else fresh.normal_(0.0, 0.02, generator=generator)
                setattr(module, name, nn.Parameter(fresh, requires_grad=False))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), "something stayed without values"
    model.is_loaded_in_4bit = model.is_quantized = True  # what PEFT looks at to choose its 4-bit LoRA layer
    model.config.quantization_config = nf4(device)
    return model


def quantised_linear(linear: nn.Linear, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> nn.Module:
    """A `Linear4bit` (NF4, double quantisation) of this one's shape, with random weights."""
    made = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype,
                                      compress_statistics=True, quant_type="nf4", device=torch.device("meta"))  # fmt: skip
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
    made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made).to(device)
    if linear.bias is not None:
        made.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=device), requires_grad=False)
    return made
