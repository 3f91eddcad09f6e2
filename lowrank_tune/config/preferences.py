"""Settings of the algorithms that learn from preference pairs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import Settings


class RewardModelConfig(Settings):
    """Settings of `algorithm: reward`: the Bradley-Terry loss, with the margin of each row that has one."""

    center_rewards_coefficient: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of (R+ + R-)^2, which keeps the scores around 0 (arXiv:2312.09244)."""


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
