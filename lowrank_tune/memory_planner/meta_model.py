"""Makes a base of a few layers on meta tensors from its configuration, with bitsandbytes' own 4-bit modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from lowrank_tune.config import AdapterConfig, BaseConfig
from lowrank_tune.memory_planner.fake_device import replaced
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.model.base import (
    Base,
    base_dtype,
    check_quantization,
    freeze_base,
    load_config,
    nf4_config,
    silence_transformers,
)
from lowrank_tune.model.configs import config_of

BLOCK = 64
NESTED_BLOCK = 256
"""bitsandbytes' defaults: weights that share a scale, and scales that share a scale."""
WITHOUT_KEYS = ", keys of another layer"
"""End of the kind of a layer that uses the keys and values of an earlier one (Gemma 4)."""


@dataclass(frozen=True)
class Layer:
    """What the memory of a layer depends on: its kind of attention, if a model has several, and whether it is
    recomputed."""

    kind: str = ""
    recomputed: bool = True

    @property
    def layer_type(self) -> str:
        """The kind of attention as transformers names it."""
        return self.kind.removesuffix(WITHOUT_KEYS)

    @property
    def has_keys(self) -> bool:
        """Whether the layer computes keys and values."""
        return not self.kind.endswith(WITHOUT_KEYS)


def config_for(base: BaseConfig) -> Any:
    """Returns the base's configuration: from the package for bases of the presets, else with `load_config`. Raises
    UserError."""
    folder = Path(base.model.partition("@")[0]).expanduser()
    bundled = None
    if not folder.is_dir():
        bundled = config_of(base.model)
    if bundled is None:
        config = load_config(base)
    else:
        silence_transformers()
        config = AutoConfig.for_model(**bundled)
    check_quantization(config, base)
    return config


def layers_of(config: Any, recomputed: int) -> list[Layer]:
    """Returns all layers of a model, the first `recomputed` of which are recomputed."""
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [""] * text.num_hidden_layers)
    for number in range(text.num_hidden_layers - _num_without_keys(text), text.num_hidden_layers):
        kinds[number] += WITHOUT_KEYS
    return [Layer(kind, number < recomputed) for number, kind in enumerate(kinds)]


def _num_without_keys(text: Any) -> int:
    return int(getattr(text, "num_kv_shared_layers", None) or 0)


def with_few_layers(config: Any, layers: Sequence[Layer]) -> Any:
    """Returns the configuration of a model with only these layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    overrides = _overrides_by_type(text)
    if overrides:
        text.per_layer_config = None
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None):
        text.layer_types = [layer.layer_type for layer in layers]
    if _num_without_keys(text):
        text.num_kv_shared_layers = sum(not layer.has_keys for layer in layers)
    if overrides:
        types = enumerate(text.layer_types)
        text.per_layer_config = {number: overrides[kind] for number, kind in types if kind in overrides}
    return config


def _overrides_by_type(text: Any) -> dict[str, Any]:
    """Returns what a configuration sets for the layers of one type, such as wider heads. It is the same for all layers
    of that type."""
    if not getattr(text, "layer_types", None):
        return {}
    by_layer = text.to_dict().get("per_layer_config", {})
    return {text.layer_types[int(number)]: values for number, values in by_layer.items()}


def shared_keys_of(config: Any, layers: Sequence[Layer]) -> AbstractContextManager[None]:
    """Returns the context in which a model is built from `with_few_layers`, so that exactly these of its layers have no
    keys of their own.

    transformers takes the last layers of a model for them. Among a few layers these are not always the last, because
    recomputed layers are first. In older versions they cannot be chosen, and the plan is approximate.
    """
    config_class = type(config.get_text_config())
    if all(layer.has_keys for layer in layers) or not hasattr(config_class, "kv_sharing_modes"):
        return nullcontext()
    modes = [None if layer.has_keys else "reuse" for layer in layers]
    for number, layer in enumerate(layers):
        earlier = [n for n in range(number) if layers[n].layer_type == layer.layer_type and layers[n].has_keys]
        if not layer.has_keys and earlier:
            modes[earlier[-1]] = "store"
    return replaced(config_class, "kv_sharing_modes", modes)


def meta_base(
    config: Any,
    base_config: BaseConfig,
    device: torch.device,
) -> Base:
    """Returns the frozen base as `load_base` would make it from this configuration, on meta tensors. Enter
    `fake_device_mode` first."""
    dtype = base_dtype(base_config, device)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if base_config.bits == 4:
            quantizer = Bnb4BitHfQuantizer(nf4_config(device))
            quantizer.pre_quantized = False
            quantizer._process_model_before_weight_loading(model, None)
            # PEFT reads this attribute: its 4-bit layers copy more than its plain ones.
            model.is_loaded_in_4bit = True
            for module in model.modules():
                if isinstance(module, bitsandbytes.nn.Linear4bit):
                    _quantize(module, dtype)
    return freeze_base(
        model,
        None,
        name=base_config.model,
        bits=base_config.bits,
    )


def _quantize(module: Any, dtype: torch.dtype) -> None:
    shape = torch.Size((module.out_features, module.in_features))
    blocks = math.ceil(shape.numel() / BLOCK)
    nested = QuantState(
        torch.empty(math.ceil(blocks / NESTED_BLOCK)),
        code=torch.empty(256),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        torch.empty(blocks, dtype=torch.uint8),
        shape=shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=nested,
    )
    packed = torch.empty(
        math.ceil(shape.numel() / 2),
        1,
        dtype=torch.uint8,
    )
    module.weight = bitsandbytes.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        bnb_quantized=True,
        module=module,
    )
    module.quant_state = state
    if module.bias is not None:
        module.bias = nn.Parameter(torch.empty(module.out_features, dtype=dtype), requires_grad=False)


def stored_tensors(model: Any) -> list[torch.Tensor]:
    """Returns all tensors of a base: packed weights with their scales, and buffers."""
    tensors = []
    for tensor in (*model.parameters(), *model.buffers()):
        tensors.append(tensor)
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [
                    state.state2.absmax,
                    state.state2.code,
                    state.offset,
                ]
    return tensors


def meta_lora_config(base: BaseConfig, adapter: AdapterConfig) -> LoraConfig:
    """Returns the LoRA configuration of an adapter that does not exist yet."""
    config = config_for(base)
    layers = list(dict.fromkeys(layers_of(config, 0)))
    with torch.device("meta"), shared_keys_of(config, layers):
        return lora_config(adapter, AutoModelForCausalLM.from_config(with_few_layers(config, layers)))
