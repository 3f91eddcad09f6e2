"""Checks of what the files of a saved adapter contain: options, ranks and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lowrank_tune.errors import UserError
from lowrank_tune.model.module_patterns import value_by_name

PREFIX = "base_model.model."
LORA_A = ".lora_A.weight"
"""Beginning and end of the name of a tensor of shape (rank, in)."""
DEFAULT_RANK = 8
"""PEFT's rank where `r` is not set."""


def _is_number(
    value: Any,
    minimum: float = 0.0,
    maximum: float = 1e9,
) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and minimum <= value <= maximum


def _is_number_map(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))


def _is_rank_map(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_rank, value.values())))


def _is_name_list(value: Any) -> bool:
    if isinstance(value, list) and value:
        return all(isinstance(name, str) for name in value)
    return isinstance(value, str)


def _is_optional_name_list(value: Any) -> bool:
    return value is None or _is_name_list(value)


def _is_layer_list(value: Any) -> bool:
    entries = value if isinstance(value, list) else [value]
    return value is None or all(type(entry) is int and entry >= 0 for entry in entries)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value, 1)


def _is_dropout(value: Any) -> bool:
    return _is_number(value, 0, 0.999)


OPTION_VALIDATORS = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "lora_dropout": _is_dropout,
    "target_modules": _is_name_list,
    "exclude_modules": _is_optional_name_list,
    "layers_to_transform": _is_layer_list,
    "layers_pattern": _is_optional_name_list,
    "rank_pattern": _is_rank_map,
    "alpha_pattern": _is_number_map,
}


def check_options(raw: Mapping[str, Any]) -> None:
    """Raises UserError, which begins with the option, for a value of the wrong type or outside of its limits."""
    for name, is_valid in OPTION_VALIDATORS.items():
        if name in raw and not is_valid(raw[name]):
            raise UserError(f"{name} is {raw[name]!r:.200}")


def checked_rank(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Returns the rank of modules that no pattern names. Raises UserError if the ranks of the configuration are not
    those of the tensors, because PEFT allocates what the configuration names."""
    ranks = {
        name.removeprefix(PREFIX).removesuffix(LORA_A): len(tensor) if tensor.ndim else 0
        for name, tensor in tensors.items()
        if name.endswith(LORA_A)
    }
    default = int(raw.get("r", DEFAULT_RANK))
    stated = value_by_name("rank_pattern", raw.get("rank_pattern"), list(ranks))
    for name, rank in ranks.items():
        key = "rank_pattern" if name in stated else "r"
        if stated.get(name, default) != rank:
            raise UserError(f"{key} gives {name} rank {stated.get(name, default)}, and its tensor has rank {rank}")
    # No tensor has the default rank if the patterns name all modules. It then has no effect, and may be any number.
    return min(default, max(ranks.values(), default=1))


def check_finite(
    name: str,
    tensor: Tensor,
    where: str,
) -> None:
    """Raises UserError if a tensor contains NaN or infinity; `where` begins the message."""
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise UserError(
            f"{where}: {name} contains NaN or infinity, so the adapter cannot be used: take an earlier checkpoint"
        )
