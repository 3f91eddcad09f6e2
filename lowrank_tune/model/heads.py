"""The scalar head of a reward or value role: hidden state to one number, fp32, saved with the adapter in PEFT's
format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEAD_WEIGHT_KEY = "base_model.model.score.weight"
"""The name of a head's weight in an adapter's file: PEFT stores it as `score` of a sequence classifier with one
label."""
HEAD_CONFIG = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
"""The keys of `adapter_config.json` for a head."""


class ScalarHead(nn.Module):
    """(..., d) -> (...) fp32, without a bias. It starts at zero, so a fresh model gives all rows the same score,
    whatever the seed."""

    def __init__(
        self,
        width: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros(
                1,
                width,
                dtype=torch.float32,
                device=device,
            )
        )

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight).squeeze(-1)
