"""A whole recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lowrank_tune.settings.common import NonEmptyStr, RunName, Settings
from lowrank_tune.settings.data import DataConfig
from lowrank_tune.settings.model import AdapterConfig, BaseConfig, default_adapter_name, extra_adapters
from lowrank_tune.settings.preferences import DPOConfig, RewardModelConfig
from lowrank_tune.settings.rewards import RewardConfig
from lowrank_tune.settings.rollouts import GRPOConfig, PPOConfig, RolloutConfig
from lowrank_tune.settings.train import EvaluationConfig, TrainingConfig

DEFAULT_LEARNING_RATES = {"sft": 2e-4, "reward": 1e-4, "dpo": 5e-6, "grpo": 1e-5, "ppo": 1e-5}
"""Peak learning rates for LoRA where a recipe gives none; docs/preset-choices.md has the sources."""


class RecipeConfig(Settings):
    """One run, complete."""

    name: RunName = ""
    """Name of the run and of its folder under `runs/`; the recipe file's name where it is not given."""
    description: str = ""
    """One line for `lowrank-tune presets`."""
    algorithm: Literal["sft", "reward", "dpo", "ppo", "grpo"]
    """What is optimized."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seeds everything."""
    base: BaseConfig = BaseConfig()
    """The frozen base."""
    adapters: dict[str, AdapterConfig] = Field(
        default_factory=dict, json_schema_extra={"propertyNames": {"pattern": "^[a-z][a-z0-9_]{0,39}$"}}
    )
    """`policy` (for a reward model: `reward`) is trained; every other one needs a `path` and lies frozen below it, in
    this order. For ppo `value` is trained too, by default in the policy's shape; with a `path` it goes on from
    there."""
    reference: NonEmptyStr | None = None
    """What the policy is held to and compared with, as a check: `base`, or the frozen adapter right below the policy.
    It is always the policy's stack without its top; a recipe that says otherwise is refused."""
    data: DataConfig
    """What is trained on."""
    train: TrainingConfig = TrainingConfig()
    """The loop."""
    reward: RewardModelConfig = RewardModelConfig()
    """What `algorithm: reward` optimizes."""
    dpo: DPOConfig = DPOConfig()
    """What `algorithm: dpo` optimizes."""
    rewards: Annotated[tuple[RewardConfig, ...], Field(strict=False)] = ()
    """What completions earn."""
    rewards_check: Literal["strict", "warn", "off"] = "strict"
    """Before training the rewards score reference answers and wrong answers. Where they do not separate the two:
    refuse to train, log a warning, or do not try it at all."""
    rollout: RolloutConfig = RolloutConfig()
    """How completions are drawn while training."""
    grpo: GRPOConfig = GRPOConfig()
    """What `algorithm: grpo` optimizes."""
    ppo: PPOConfig = PPOConfig()
    """What `algorithm: ppo` optimizes."""
    evaluate: EvaluationConfig = EvaluationConfig()
    """Held-out measurements."""

    @property
    def trained_adapter(self) -> str:
        """The adapter that is trained."""
        return default_adapter_name(self.algorithm)

    @property
    def extra_adapters(self) -> tuple[str, ...]:
        """The adapters that lie in no policy's stack, but for the reward model's."""
        return extra_adapters(self.algorithm)

    @property
    def uses_pairs(self) -> bool:
        """Whether a row of the data is a chosen and a rejected answer."""
        return self.algorithm in ("reward", "dpo")

    @property
    def needs_ground_truth(self) -> bool:
        """Whether a reward compares completions with gold answers."""
        return any(reward.name == "answer" for reward in self.rewards)

    @property
    def max_train_length(self) -> int:
        """Tokens of the longest row that is trained on."""
        if self.algorithm in ("grpo", "ppo"):
            return self.data.max_prompt_length + self.rollout.max_new_tokens
        return self.data.max_length

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row by the settings, whatever the data holds: of those that are trained on, and of
        held-out answers, whose prompts count with `data.max_prompt_length`."""
        if self.evaluate.eval_dataset is None:
            return self.max_train_length
        return max(self.max_train_length, self.data.max_prompt_length + self.evaluate.max_new_tokens)

    @property
    def metric_for_best_model(self) -> str:
        """What makes a step the best."""
        return self.evaluate.metric_for_best_model or (
            "accuracy" if self.algorithm in ("grpo", "ppo") and self.evaluate.eval_dataset else "loss"
        )

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data; `recipe.load` of it gives this recipe again."""
        return self.model_dump(mode="json", exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _with_trained_adapter(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("adapters", {}), dict):
            return data
        adapters, name = data.get("adapters", {}), default_adapter_name(data.get("algorithm"))
        return data if name in adapters else {**data, "adapters": {**adapters, name: {}}}

    @model_validator(mode="before")
    @classmethod
    def _with_learning_rate(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        rate = DEFAULT_LEARNING_RATES.get(algorithm) if isinstance(algorithm := data.get("algorithm"), str) else None
        train = data.get("train", {})
        if rate is None:
            return data
        if isinstance(train, TrainingConfig) and "learning_rate" not in train.model_fields_set:
            return {**data, "train": train.model_copy(update={"learning_rate": rate})}
        if isinstance(train, dict) and "learning_rate" not in train:
            return {**data, "train": {**train, "learning_rate": rate}}
        return data
