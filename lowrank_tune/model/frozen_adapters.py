"""Frozen adapters in the dtype of autocast.

Autocast keeps no cast copy of weights that need no gradient: in every forward pass of a stack it would cast the frozen
adapters again. In half precision they are stored as autocast would cast them, in half of the memory. Their fp32 values
stay in host memory, so that what is saved, merged or hashed is what was loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class FrozenAdapters:
    """Parameters that are stored in `dtype`, and their fp32 values on the CPU by the name of the parameter."""

    dtype: torch.dtype
    originals: dict[str, Tensor] = field(default_factory=dict)

    def store(self, name: str, parameter: nn.Parameter) -> None:
        """Casts a parameter and keeps its value."""
        if parameter.dtype != self.dtype:
            self.originals[name] = parameter.detach().cpu()
            parameter.data = parameter.data.to(self.dtype)

    def restore(self, name: str, parameter: nn.Parameter) -> None:
        """Makes a parameter fp32 again, with the value that it had."""
        if name in self.originals:
            parameter.data = self.originals.pop(name).to(parameter.device)

    def adapter_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Returns the fp32 values of an adapter, with the names of PEFT's file format, which omits the adapter's."""
        part = f".{adapter}."
        return {name.replace(part, "."): value for name, value in self.originals.items() if part in name}
