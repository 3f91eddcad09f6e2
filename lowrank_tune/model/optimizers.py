"""The optimizers by name. Their states are tensors and numbers, which a checkpoint restores exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowrank_tune.errors import UserError

if TYPE_CHECKING:  # the model floor must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import TrainingConfig


def make_optimizer(
    parameters: list[nn.Parameter] | list[dict[str, Any]],
    train: TrainingConfig,
    device: torch.device,
) -> torch.optim.Optimizer:
    """Returns AdamW (arXiv:1711.05101) on the fp32 masters, fused; or bitsandbytes' AdamW with 8-bit states
    (arXiv:2110.02861; tensors of fewer than 4,096 elements keep them in fp32), or paged ones. Raises UserError for
    paged ones without a GPU.

    Groups of parameters (torch's `{"params": [...]}`) may have a `share`: the factor of their learning rate.
    """
    betas = (train.adam_beta1, train.adam_beta2)
    decay = train.weight_decay
    if train.optim == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=train.learning_rate,
            betas=betas,
            weight_decay=decay,
            fused=True,
        )
    check_optimizer(train, device.type)
    # Imported late, because it is slow and few runs need it.
    import bitsandbytes.optim as optim

    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW32bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    return kinds[train.optim](  # type: ignore[no-any-return]
        parameters,
        lr=train.learning_rate,
        betas=betas,
        weight_decay=decay,
    )


def check_optimizer(train: TrainingConfig, device_type: str) -> None:
    """Raises UserError for an optimizer that this kind of device does not support."""
    if device_type != "cuda" and train.optim.startswith("paged_"):
        raise UserError(
            f"train.optim: {train.optim} moves its states between GPU and host memory, and there is no GPU; "
            f"use {train.optim.removeprefix('paged_')}"
        )


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Calls `load_state_dict`, and then pages the states again that were paged: bitsandbytes leaves them on the GPU."""
    optimizer.load_state_dict(dict(state))
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, entry in optimizer.state.items():
        for name in ("state1", "state2"):
            loaded = entry.get(name)
            if isinstance(loaded, torch.Tensor):
                entry[name] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)  # type: ignore[attr-defined]
                entry[name].copy_(loaded)
