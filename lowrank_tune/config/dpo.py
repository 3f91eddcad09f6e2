"""Settings of `algorithm: dpo`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import Finding, Settings


class DPOConfig(Settings):
    """Settings of `algorithm: dpo`."""

    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "sigmoid_norm"] = "sigmoid"
    """Preference loss: `sigmoid` (DPO), `ipo` (IPO), `hinge` (SLiC), `robust` (robust DPO), `apo_zero` (APO-zero), or
    `sigmoid_norm` (sigmoid of log-probs per token)."""
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """Strength of the reference: with a higher value the policy stays closer to it."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1
    """For `robust`: assumed share of pairs whose sides are swapped."""
    sft_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of an SFT loss on the chosen answers, which keeps them from becoming less likely."""

    def findings(self) -> Iterator[Finding]:
        """Yields label smoothing for a loss that does not smooth its labels."""
        if self.is_set("label_smoothing") and self.loss_type != "robust":
            yield (
                ("label_smoothing",),
                f"does nothing for the loss {self.loss_type}; it belongs to `dpo.loss_type`: robust",
            )
