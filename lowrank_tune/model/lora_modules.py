"""The linear modules of a model with LoRA adapters: which of them compute base(x) + scaling B A x and nothing else, and
which of them read the same input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of modules that read the same tensor, in the order in which the layers of transformers call them."""


def groups_of_same_input(modules: Iterable[Any]) -> list[list[Any]]:
    """Returns all modules in groups: query, key and value together, gate and up together, every other module alone."""
    groups = []
    seen = set[int]()
    for module in modules:
        for names in SAME_INPUT:
            group = [getattr(module, name) for name in names if hasattr(module, name)]
            if len(group) == len(names) and seen.isdisjoint(map(id, group)):
                groups.append(group)
                seen.update(map(id, group))
        if id(module) not in seen:
            groups.append([module])
    return groups


def base_layer_of(module: Any) -> Any:
    """Returns the module below the adapters, the module itself if it has none."""
    return getattr(module, "base_layer", module)


def has_forward_hooks(module: Any) -> bool:
    """Returns whether a call of the module does more than its own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_plain_lora(module: Any, stack: Sequence[str]) -> bool:
    """Returns whether PEFT computes base(x) + scaling B A x for each adapter of the stack, and nothing else."""
    if not all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling", "lora_variant")):
        return False
    if module.merged or module.disable_adapters or getattr(module, "fan_in_fan_out", False):
        return False
    adapter_names = [name for name in stack if name in module.lora_A]
    return all(name not in module.lora_variant and module.lora_B[name].bias is None for name in adapter_names)


def joined_adapters(
    module: Any,
    stack: Sequence[str],
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns all adapters of the stack as one, for a weight (in, out): down (in, r) and up (r, out), scaled. r is 0 if
    no adapter of the stack changes the module."""
    downs = []
    ups = []
    for name in stack:
        if name in getattr(module, "lora_A", ()):
            downs.append(module.lora_A[name].weight.detach())
            ups.append(module.lora_B[name].weight.detach() * module.scaling[name])
    if not downs:
        in_features, out_features = weight.shape
        return weight.new_zeros(in_features, 0), weight.new_zeros(0, out_features)
    return torch.cat(downs).T.contiguous(), torch.cat(ups, dim=1).T.contiguous()
