"""Settings of `algorithm: kto`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import Settings

ClassWeight = Annotated[float, Field(gt=0.0)] | Literal["auto"]


class KTOConfig(Settings):
    """Settings of `algorithm: kto`."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Loss: `kto`, or `apo_zero_unpaired` (APO-zero for single answers), which needs no KL estimate."""
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """Strength of the reference: with a higher value the policy stays closer to it."""
    desirable_weight: ClassWeight = "auto"
    """Weight of the loss of desirable answers. `auto`: 1, or the weight that balances the classes: the weight of all
    desirable answers divided by that of all undesirable ones is then at least 1 and at most 4/3."""
    undesirable_weight: ClassWeight = "auto"
    """Weight of the loss of undesirable answers; `auto` as for `desirable_weight`."""
