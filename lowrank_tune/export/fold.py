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
from torch import Tensor

from lowrank_tune.model.heads import KEY

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Part:
    """One adapter of a stack: its `adapter_config.json`, its tensors under PEFT's names, and the scale of each module
    that it changes."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    scalings: Mapping[str, float]

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each module, fp32, by the module's name in the plain model. The scale is in B."""
        names = [key.removeprefix(PREFIX).removesuffix(A) for key in self.tensors if key.endswith(A)]
        return {
            name: (
                self.tensors[PREFIX + name + A].float(),
                self.tensors[PREFIX + name + B].float() * self.scalings[name],
            )
            for name in names
        }


def saved_part(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
    """An adapter as it lies on disk, without the model that it belongs to: what PEFT would make of its ranks, alphas
    and patterns."""
    scalings = {}
    for key, tensor in tensors.items():
        if key.endswith(A):
            name = key.removeprefix(PREFIX).removesuffix(A)
            alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
            scalings[name] = alpha / (len(tensor) ** 0.5 if config.get("use_rslora") else len(tensor))
    return Part(config, tensors, scalings)


def _by_pattern(patterns: Mapping[str, float] | None, name: str, otherwise: float) -> float:
    """The entry of the first pattern that matches the end of a module's name."""
    return next(
        (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name)), otherwise
    )


def why_not(parts: Sequence[Part]) -> str | None:
    """Why these cannot be folded; None where they can. Matrices on linear modules can, and the head of the top one
    stays what it is."""
    for part in parts:
        other = sorted(key for key in part.tensors if not key.endswith((A, B)) and key != KEY)
        if other:
            return f"{other[0]} is no matrix of a linear module"
    return None


def fold(parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of the one adapter that is all of them, lowest first. A lone one that everybody reads
    alike stays as it is, but that an rsLoRA's scale is written as an ordinary alpha."""
    assert parts and why_not(parts) is None, "nothing to fold, or what cannot be"
    top = parts[-1]
    if len(parts) == 1 and not top.config.get("rank_pattern") and not top.config.get("alpha_pattern"):
        r = int(top.config["r"])
        alpha = float(top.config["lora_alpha"]) * (r**0.5 if top.config.get("use_rslora") else 1.0)
        return {**top.config, "lora_alpha": alpha, "use_rslora": False}, dict(top.tensors)
    several = [part.pairs() for part in parts]
    names = sorted({name for pairs in several for name in pairs})
    rank = max(sum(len(pairs[name][0]) for pairs in several if name in pairs) for name in names)
    tensors = {}
    for name in names:
        mine = [pairs[name] for pairs in several if name in pairs]
        a, b = torch.cat([pair[0] for pair in mine]), torch.cat([pair[1] for pair in mine], dim=1)
        spare = rank - len(a)
        tensors[PREFIX + name + A] = torch.nn.functional.pad(a, (0, 0, 0, spare))
        tensors[PREFIX + name + B] = torch.nn.functional.pad(b, (0, spare))
    if KEY in top.tensors:
        tensors[KEY] = top.tensors[KEY]
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
        "target_modules": _targets(parts, names),
    }
    return {**top.config, **plain}, tensors


def _targets(parts: Sequence[Part], names: Sequence[str]) -> list[str]:
    """Last names, where each adapter sits on every module of its; else whole names."""
    simple = all(
        isinstance(part.config.get("target_modules"), list)
        and not part.config.get("exclude_modules")
        and part.config.get("layers_to_transform") is None
        for part in parts
    )
    return sorted({name for part in parts for name in part.config["target_modules"]}) if simple else list(names)
