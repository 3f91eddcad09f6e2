"""A stack of LoRA adapters as one, exactly: the products add, so the ranks do.

With h the input of a module, a stack adds  sum_i s_i B_i A_i h  to its output. One adapter with  A = [A_1; A_2; ...]
and B = [s_1 B_1, s_2 B_2, ...]  adds the same at scale 1. Every module gets the same rank, where need be with rows of
zeros: llama.cpp and vLLM read one rank and one alpha for the whole adapter, and no `rank_pattern`, and llama.cpp knows
no rsLoRA. (PEFT's own `add_weighted_adapter(combination_type="cat")` is wrong where the first adapter is an rsLoRA
one.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from lowrank_tune.errors import UserError
from lowrank_tune.model.heads import HEAD_WEIGHT_KEY
from lowrank_tune.model.roles import ADAPTER_PREFIX, Roles

PEFT_PREFIX = "base_model.model."
LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"


@dataclass(frozen=True)
class LoraAdapter:
    """One adapter of a stack: its `adapter_config.json`, its tensors under PEFT's names, and the scale of each module
    that it changes."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    scalings: Mapping[str, float]

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each module, fp32, by the module's name in the plain model. The scale is in B."""
        names = [key.removeprefix(PEFT_PREFIX).removesuffix(LORA_A) for key in self.tensors if key.endswith(LORA_A)]
        return {
            name: (
                self.tensors[PEFT_PREFIX + name + LORA_A].float(),
                self.tensors[PEFT_PREFIX + name + LORA_B].float() * self.scalings[name],
            )
            for name in names
        }


def saved_lora_adapter(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LoraAdapter:
    """An adapter as it lies on disk, without the model that it belongs to: what PEFT would make of its ranks, alphas
    and patterns."""
    scalings = {}
    for key, tensor in tensors.items():
        if key.endswith(LORA_A):
            name = key.removeprefix(PEFT_PREFIX).removesuffix(LORA_A)
            alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
            scalings[name] = alpha / (len(tensor) ** 0.5 if config.get("use_rslora") else len(tensor))
    return LoraAdapter(config, tensors, scalings)


def _by_pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """The entry of the first pattern that matches the end of a module's name."""
    return next(
        (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name)), default
    )


def cannot_combine_reason(adapters: Sequence[LoraAdapter]) -> str | None:
    """Why these cannot be folded; None where they can. Matrices on linear modules can, and the head of the top one
    stays what it is."""
    for adapter in adapters:
        other = sorted(key for key in adapter.tensors if not key.endswith((LORA_A, LORA_B)) and key != HEAD_WEIGHT_KEY)
        if other:
            return f"{other[0]} is no matrix of a linear module"
    return None


def combine_adapters(adapters: Sequence[LoraAdapter]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of the one adapter that is all of them, lowest first. A lone one that everybody reads
    alike stays as it is, but that an rsLoRA's scale is written as an ordinary alpha."""
    assert adapters and cannot_combine_reason(adapters) is None, "nothing to fold, or what cannot be"
    top = adapters[-1]
    if len(adapters) == 1 and not top.config.get("rank_pattern") and not top.config.get("alpha_pattern"):
        r = int(top.config["r"])
        alpha = float(top.config["lora_alpha"]) * (r**0.5 if top.config.get("use_rslora") else 1.0)
        return {**top.config, "lora_alpha": alpha, "use_rslora": False}, dict(top.tensors)
    pairs_by_adapter = [adapter.pairs() for adapter in adapters]
    names = sorted({name for pairs in pairs_by_adapter for name in pairs})
    rank = max(sum(len(pairs[name][0]) for pairs in pairs_by_adapter if name in pairs) for name in names)
    tensors = {}
    for name in names:
        module_pairs = [pairs[name] for pairs in pairs_by_adapter if name in pairs]
        a = torch.cat([pair[0] for pair in module_pairs])
        b = torch.cat([pair[1] for pair in module_pairs], dim=1)
        padding = rank - len(a)
        tensors[PEFT_PREFIX + name + LORA_A] = torch.nn.functional.pad(a, (0, 0, 0, padding))
        tensors[PEFT_PREFIX + name + LORA_B] = torch.nn.functional.pad(b, (0, padding))
    if HEAD_WEIGHT_KEY in top.tensors:
        tensors[HEAD_WEIGHT_KEY] = top.tensors[HEAD_WEIGHT_KEY]
    plain = {
        "r": rank,
        "lora_alpha": float(rank),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "rank_pattern": {},
        "alpha_pattern": {},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "target_modules": _target_modules(adapters, names),
    }
    return {**top.config, **plain}, tensors


def _target_modules(adapters: Sequence[LoraAdapter], names: Sequence[str]) -> list[str]:
    """Last names, where each adapter sits on every module of its; else whole names."""
    simple = all(
        isinstance(adapter.config.get("target_modules"), list)
        and not adapter.config.get("exclude_modules")
        and adapter.config.get("layers_to_transform") is None
        for adapter in adapters
    )
    if simple:
        return sorted({name for adapter in adapters for name in adapter.config["target_modules"]})
    return list(names)


def as_lora_adapter(roles: Roles, name: str) -> LoraAdapter:
    """An adapter of a loaded model, as it would be saved. A head that stands alone has no scales."""
    return LoraAdapter(roles.adapter_config(name), roles.adapter_tensors(name), roles.scalings(name))


def lora_adapters_of(roles: Roles) -> list[LoraAdapter]:
    """The policy's adapters with their scales. Raises UserError for what cannot be added to a weight. (An adapter on
    the output head is refused by `Roles`: where the head is tied, a merged one would change what is read too.)"""
    names = [name.removeprefix(ADAPTER_PREFIX) for name in roles.stacks["policy"]]
    adapters = [
        LoraAdapter(roles.adapter_config(name), roles.adapter_tensors(name), roles.scalings(name)) for name in names
    ]
    if (reason := cannot_combine_reason(adapters)) is not None:
        raise UserError(f"this adapter cannot be merged: {reason}")
    model = roles.base.model
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.scalings):
        layer = model.get_submodule(module).base_layer
        if not isinstance(layer, (nn.Linear, Linear4bit)):
            raise UserError(
                f"this adapter cannot be merged: {module} is a {type(layer).__name__}, and only linear modules are "
                f"known here"
            )
    return adapters
