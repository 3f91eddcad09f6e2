"""Combines a stack of LoRA adapters exactly in one adapter: the products add, so the ranks do.

With h the input of a module, a stack adds  sum_i s_i B_i A_i h  to its output. One adapter with  A = [A_1; A_2; ...]
and B = [s_1 B_1, s_2 B_2, ...]  adds the same at scale 1. Every module gets the same rank, if necessary with rows of
zeros: llama.cpp and vLLM read one rank and one alpha for the whole adapter, and no `rank_pattern`, and llama.cpp does
not support rsLoRA. (PEFT's own `add_weighted_adapter(combination_type="cat")` is wrong if the first adapter is an
rsLoRA one.)
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
    """One adapter of a stack: its `adapter_config.json`, its tensors under PEFT's names, and the scale of each
    module."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    scalings: Mapping[str, float]

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns A (r, in) and B (out, r) of each module in fp32, by the module's name in the base model. B contains
        the scale."""
        pairs = {}
        for key in self.tensors:
            if key.endswith(LORA_A):
                name = module_name(key)
                a = self.tensors[key].float()
                b = self.tensors[PEFT_PREFIX + name + LORA_B].float()
                pairs[name] = (a, b * self.scalings[name])
        return pairs


def module_name(key: str) -> str:
    """Returns the name of a module in the base model from the key of its A matrix."""
    return key.removeprefix(PEFT_PREFIX).removesuffix(LORA_A)


def saved_lora_adapter(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LoraAdapter:
    """Returns an adapter from its files, without the base: with the scales that PEFT derives from ranks, alphas and
    patterns."""
    scalings = {}
    for key, tensor in tensors.items():
        if key.endswith(LORA_A):
            name = module_name(key)
            rank = len(tensor)
            alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
            scalings[name] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return LoraAdapter(config, tensors, scalings)


def _by_pattern(
    patterns: Mapping[str, float] | None,
    name: str,
    default: float,
) -> float:
    """Returns the value of the first pattern that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def cannot_combine_reason(adapters: Sequence[LoraAdapter]) -> str | None:
    """Returns why adapters cannot be combined, None if they can: they may contain matrices of linear modules, and a
    head, of which the top one is kept."""
    for adapter in adapters:
        for key in sorted(adapter.tensors):
            if not key.endswith((LORA_A, LORA_B)) and key != HEAD_WEIGHT_KEY:
                return f"{key} is not a matrix of a linear module"
    return None


def combine_adapters(adapters: Sequence[LoraAdapter]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns configuration and tensors of one adapter equal to the stack, which is given lowest first. A single
    adapter without patterns keeps its tensors; the scale of rsLoRA is written as an ordinary alpha."""
    assert adapters and cannot_combine_reason(adapters) is None, "these adapters cannot be combined"
    top = adapters[-1]
    has_patterns = bool(top.config.get("rank_pattern") or top.config.get("alpha_pattern"))
    if len(adapters) == 1 and not has_patterns:
        alpha = float(top.config["lora_alpha"])
        if top.config.get("use_rslora"):
            alpha = alpha * int(top.config["r"]) ** 0.5
        return {
            **top.config,
            "lora_alpha": alpha,
            "use_rslora": False,
        }, dict(top.tensors)
    stacked = _stack_matrices(adapters)
    rank = max(len(a) for a, _ in stacked.values())
    tensors = {}
    for name, (a, b) in stacked.items():
        padding = rank - len(a)
        tensors[PEFT_PREFIX + name + LORA_A] = nn.functional.pad(a, (0, 0, 0, padding))
        tensors[PEFT_PREFIX + name + LORA_B] = nn.functional.pad(b, (0, padding))
    if HEAD_WEIGHT_KEY in top.tensors:
        tensors[HEAD_WEIGHT_KEY] = top.tensors[HEAD_WEIGHT_KEY]
    combined_config = {
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
        "target_modules": _target_modules(adapters, list(stacked)),
    }
    return {**top.config, **combined_config}, tensors


def _stack_matrices(adapters: Sequence[LoraAdapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns A and B of all adapters of each module side by side, by module in sorted order."""
    matrices: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for adapter in adapters:
        for name, (a, b) in adapter.pairs().items():
            a_matrices, b_matrices = matrices.setdefault(name, ([], []))
            a_matrices.append(a)
            b_matrices.append(b)
    stacked = {}
    for name in sorted(matrices):
        a_matrices, b_matrices = matrices[name]
        stacked[name] = (torch.cat(a_matrices), torch.cat(b_matrices, dim=1))
    return stacked


def _target_modules(adapters: Sequence[LoraAdapter], names: Sequence[str]) -> list[str]:
    """Returns the last names of the modules if each adapter is on every module of its names, else the whole names."""
    targets: set[str] = set()
    for adapter in adapters:
        listed = adapter.config.get("target_modules")
        excludes_modules = bool(adapter.config.get("exclude_modules"))
        selects_layers = adapter.config.get("layers_to_transform") is not None
        if excludes_modules or selects_layers or not isinstance(listed, list):
            return list(names)
        targets |= set(listed)
    return sorted(targets)


def as_lora_adapter(roles: Roles, name: str) -> LoraAdapter:
    """Returns an adapter of a loaded model, as it would be saved. A head without adapter has no scales."""
    return LoraAdapter(roles.adapter_config(name), roles.adapter_tensors(name), roles.scalings(name))


def lora_adapters_of(roles: Roles) -> list[LoraAdapter]:
    """Returns the policy's adapters. Raises UserError for adapters that cannot be added to a weight. (`Roles` refuses
    an adapter on the output head: with a tied head, a merged one would change the embeddings too.)"""
    names = [name.removeprefix(ADAPTER_PREFIX) for name in roles.stacks["policy"]]
    adapters = [as_lora_adapter(roles, name) for name in names]
    reason = cannot_combine_reason(adapters)
    if reason is not None:
        raise UserError(f"this adapter cannot be merged: {reason}")
    for adapter in adapters:
        for module in adapter.scalings:
            layer = roles.base.model.get_submodule(module).base_layer
            if not isinstance(layer, (nn.Linear, Linear4bit)):
                kind = type(layer).__name__
                raise UserError(f"this adapter cannot be merged: {module} is a {kind}, and only linear modules can be")
    return adapters
