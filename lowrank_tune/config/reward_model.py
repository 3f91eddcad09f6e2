"""Settings of `algorithm: reward`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lowrank_tune.config.base import Settings


class RewardModelConfig(Settings):
    """Settings of `algorithm: reward`: the Bradley-Terry loss, with the margin of each row that has one."""

    center_rewards_coefficient: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of (R+ + R-)^2, which keeps the scores around 0 (arXiv:2312.09244)."""
