"""Settings of `algorithm: grpo`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import Finding, PositiveInt, Settings


class GRPOConfig(Settings):
    """Settings of `algorithm: grpo`."""

    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """`grpo`; `dapo` (mean over tokens); `dr_grpo` (no division by standard deviation or length); `gspo` (ratio of
    whole sequences); `cispo` (clipped weights)."""
    epsilon: Annotated[float, Field(gt=0.0)] = 0.2
    """Clip range of the ratio to the policy that drew the completions; only its lower side if `epsilon_high` is
    given."""
    epsilon_high: Annotated[float, Field(gt=0.0)] | None = None
    """Upper side of the clip range. Default: `epsilon`; 0.28 for `dapo`; 5 for `cispo`, where it is the maximum
    weight."""
    beta: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the KL to the reference."""
    kl_in_reward: bool = False
    """Subtracts the KL from the reward of a completion, instead of adding it to the loss of each token."""
    kl_estimator: Literal["k3_ratio", "k3", "k2", "exact"] = "k3_ratio"
    """Estimator of the KL in the loss: `k3_ratio` (k3 times the ratio, which has the gradient of KL(policy ||
    reference)), `k3`, `k2`, or `exact` over the whole vocabulary."""
    num_iterations: PositiveInt = 1
    """Passes over each rollout batch."""
    old_logprobs_from: Literal["recomputed", "sampler"] = "recomputed"
    """Old log-probs of the ratio: `recomputed` by the policy, or those of the `sampler`."""
    max_logprob_mismatch: Annotated[float, Field(gt=0.0)] = 0.1
    """Stops the run if the log-probs of the sampler and of the policy differ by more than this, in nats per token on
    average."""
    truncated_completions: Literal["keep", "mask", "penalize"] = "keep"
    """A completion cut at `rollout.max_new_tokens`: `keep` trains it as it is, `mask` leaves it out of the loss,
    `penalize` subtracts `missing_eos_penalty` from its reward."""
    missing_eos_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """Penalty for `truncated_completions: penalize`."""
    zero_std_groups: Literal["keep", "drop", "resample"] = "drop"
    """A group of equal rewards has no advantage: `keep` it for its KL, `drop` it from the update, or `resample` other
    prompts in its place."""

    def findings(self) -> Iterator[Finding]:
        """Yields a clip range, settings of the KL, and a penalty that this loss does not use."""
        if self.is_set("epsilon") and self.loss_type == "cispo":
            yield (
                ("epsilon",),
                "does nothing for the loss cispo, which limits weights only from above; use `grpo.epsilon_high`",
            )
        yield from self._unused_kl_settings()
        if self.is_set("missing_eos_penalty") and self.truncated_completions != "penalize":
            yield (
                ("missing_eos_penalty",),
                "does nothing without `grpo.truncated_completions`: penalize",
            )

    def _unused_kl_settings(self) -> Iterator[Finding]:
        for key in ("kl_in_reward", "kl_estimator"):
            if not self.is_set(key):
                continue
            if self.beta == 0.0:
                yield (
                    (key,),
                    "does nothing if `grpo.beta` is 0",
                )
            elif key == "kl_estimator" and self.kl_in_reward:
                yield (
                    (key,),
                    "does nothing with `grpo.kl_in_reward`, where the KL is the log-ratio of what was drawn",
                )
