"""The scalar head of a role that scores: hidden state to one number, fp32, saved with the adapter in PEFT's own
format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEAD_WEIGHT_KEY = "base_model.model.score.weight"
"""Where a head's weight stands in an adapter's file: PEFT puts it on the `score` of a sequence classifier with one
label."""
HEAD_CONFIG = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
"""What `adapter_config.json` says of it."""


class ScalarHead(nn.Module):
    """(..., d) -> (...) fp32, without a bias. It starts at zero: a fresh model finds everything equally good, whatever
    the seed."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width, dtype=torch.float32, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight).squeeze(-1)
