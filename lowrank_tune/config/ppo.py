"""Settings of `algorithm: ppo`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import Finding, Fraction, PositiveInt, Settings


class PPOConfig(Settings):
    """Settings of `algorithm: ppo`."""

    cliprange: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Clip range of the ratio to the policy that drew the completions."""
    entropy: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of an entropy bonus; needs a second pass through the output head."""
    num_ppo_epochs: PositiveInt = 4
    """Passes over each rollout batch."""
    num_mini_batches: PositiveInt = 1
    """Optimizer steps per pass, each on its share of the batch."""
    target_kl: Annotated[float, Field(gt=0.0)] | None = None
    """Skips the remaining passes over a batch if the updated policy differs from the one that drew the completions by
    more than this, in nats per token."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the KL to the reference, which is part of the reward of every token. With `kl_target`, the initial
    weight."""
    kl_target: Annotated[float, Field(gt=0.0)] | None = None
    """KL to the reference, in nats per token, that the weight is adapted to. Default: the weight is constant."""
    kl_gain: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Gain of this adaptation: one step changes the weight by at most the share 0.2 * `kl_gain`."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount factor of later rewards."""
    lam: Fraction = 0.95
    """Lambda of generalized advantage estimation: 1 uses the rewards alone, 0 relies on the value."""
    truncated_completions: Literal["penalize", "bootstrap", "keep"] = "penalize"
    """A completion without an end token: `penalize` subtracts `missing_eos_penalty` from its score; `bootstrap` gives
    it no score and uses the value of what follows; `keep` scores it as it is."""
    missing_eos_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """Penalty for `truncated_completions: penalize`."""
    critic: Literal["separate", "shared"] = "separate"
    """Value model: `separate` (an adapter with a head of its own) or `shared` (a head on the policy's trunk, whose loss
    updates the policy's adapter too)."""
    critic_init: Literal["policy", "reward"] = "policy"
    """Initial adapter of the value: `policy` (a new one on what is below the policy) or `reward` (a copy of the adapter
    `reward` with its head, which then predicts the weighted score)."""
    value_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate of the value. Default: `train.learning_rate`."""
    vf_coef: Annotated[float, Field(gt=0.0)] = 0.1
    """For `critic: shared`: weight of the value loss beside the policy loss."""
    cliprange_value: Annotated[float, Field(ge=0.0)] = 0.2
    """Clip range of a value around its value at the rollout; 0 for no clipping."""
    max_logprob_mismatch: Annotated[float, Field(gt=0.0)] = 0.1
    """Stops the run if the log-probs of the sampler and of the policy differ by more than this, in nats per token on
    average."""

    def findings(self) -> Iterator[Finding]:
        """Yields settings of a penalty, of the adapted KL weight, and of the value that other keys make unused."""
        if self.is_set("missing_eos_penalty") and self.truncated_completions != "penalize":
            yield (
                ("missing_eos_penalty",),
                "does nothing without `ppo.truncated_completions`: penalize",
            )
        if self.is_set("kl_gain") and not self.is_set("kl_target"):
            yield (
                ("kl_gain",),
                "does nothing without `ppo.kl_target`: the weight of the KL is constant",
            )
        if self.is_set("critic_init") and self.critic == "shared":
            yield (
                ("critic_init",),
                "does nothing with `ppo.critic`: shared, a new head on the policy's trunk",
            )
        if self.is_set("vf_coef") and self.critic == "separate":
            yield (
                ("vf_coef",),
                "does nothing with `ppo.critic`: separate, which shares no weights; there is `ppo.value_learning_rate`",
            )
        if self.is_set("kl_target") and self.kl_coef == 0.0:
            yield (
                ("kl_target",),
                "cannot be reached from `ppo.kl_coef`: 0, which stays 0 with any factor; begin with 0.05",
            )
