"""Loss scaling of float16 (Mixed Precision Training, arXiv:1710.03740, section 3.2), by torch's `GradScaler`.

Gradients below 6e-8 are 0 in float16. So the loss is multiplied by a scale, and the gradients, which are float32 in the
adapters, are divided by it before they are clipped. Where a gradient overflows, the update changes nothing and the
scale is halved; after `GROWTH_INTERVAL` updates without an overflow it is doubled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 200
"""torch's default is 2,000 steps, more than most runs have."""
MIN_SCALE = 1.0
"""A gradient that is not finite at this scale would not be without scaling either."""


class LossScaler:
    """The scale of the losses of a run; 1, and without effect, if it is not enabled."""

    def __init__(
        self,
        device: str = "cpu",
        enabled: bool = False,
    ) -> None:
        self._scaler = torch.amp.GradScaler(
            device,
            init_scale=INITIAL_SCALE,
            growth_interval=GROWTH_INTERVAL,
            enabled=enabled,
        )
        self.num_overflows = 0
        self._has_gradients = False

    @property
    def enabled(self) -> bool:
        """Whether losses are scaled."""
        return self._scaler.is_enabled()

    @property
    def scale(self) -> float:
        """The current scale."""
        return float(self._scaler.get_scale())

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss to differentiate."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients of the optimizer's parameters by the scale."""
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        self._has_gradients = any(parameter.grad is not None for parameter in parameters)
        if self._has_gradients:
            self._scaler.unscale_(optimizer)

    def update(
        self,
        loss: float,
        grad_norm: float,
    ) -> bool:
        """Updates the scale after `unscale`. Returns whether the scaling may be the cause of a gradient that is not
        finite. A loss that is not finite has another cause, and keeps the scale."""
        if not self.enabled or not self._has_gradients:
            return False
        if math.isfinite(grad_norm):
            self._scaler.update()
            return False
        has_overflowed = math.isfinite(loss) and self.scale > MIN_SCALE
        self._scaler.update(new_scale=self.scale)
        if has_overflowed:
            self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": self.scale / 2, "_growth_tracker": 0})
            self.num_overflows += 1
        return has_overflowed

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint stores."""
        return {"scaler": self._scaler.state_dict(), "num_overflows": self.num_overflows}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the state of a checkpoint."""
        if self.enabled and state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
        self.num_overflows = int(state.get("num_overflows", 0))
