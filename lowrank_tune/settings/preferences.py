"""Algorithms that learn from pairs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.settings.common import Settings


class RewardModelConfig(Settings):
    """What `algorithm: reward` optimizes: Bradley-Terry, with the margin of a row that has one."""

    center_rewards_coefficient: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of (R+ + R-)^2, which keeps the scores around 0 (arXiv:2312.09244)."""


class DPOConfig(Settings):
    """What `algorithm: dpo` optimizes."""

    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "sigmoid_norm"] = "sigmoid"
    """The preference loss: of DPO (sigmoid), IPO, SLiC (hinge), robust DPO, APO-zero, or sigmoid of log-probs a
    token."""
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """How closely the policy is held to the reference: higher is closer."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1
    """For `robust`: the share of pairs whose sides are taken to be the wrong way round."""
    sft_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of an SFT term on the chosen answers, against their unlearning."""
