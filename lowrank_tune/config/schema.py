"""The settings of a whole recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lowrank_tune.config.base import NonEmptyStr, RunName, Settings
from lowrank_tune.config.data import DataConfig
from lowrank_tune.config.model import AdapterConfig, BaseConfig, default_adapter_name, extra_adapters
from lowrank_tune.config.preferences import DPOConfig, RewardModelConfig
from lowrank_tune.config.rewards import RewardConfig
from lowrank_tune.config.rollouts import GRPOConfig, PPOConfig, RolloutConfig
from lowrank_tune.config.training import EvaluationConfig, TrainingConfig

DEFAULT_LEARNING_RATES = {"sft": 2e-4, "reward": 1e-4, "dpo": 5e-6, "grpo": 1e-5, "ppo": 1e-5}
"""Peak learning rates for LoRA where a recipe gives none; docs/preset-choices.md has the sources."""


class RecipeConfig(Settings):
    """One complete run."""

    name: RunName = ""
    """Name of the run and of its folder under `runs/`. Default: the name of the recipe file."""
    description: str = ""
    """One line for `lowrank-tune presets`."""
    algorithm: Literal["sft", "reward", "dpo", "ppo", "grpo"]
    """The training algorithm."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of all random draws."""
    base: BaseConfig = BaseConfig()
    """The frozen base."""
    adapters: dict[str, AdapterConfig] = Field(
        default_factory=dict, json_schema_extra={"propertyNames": {"pattern": "^[a-z][a-z0-9_]{0,39}$"}}
    )
    """`policy` (for a reward model: `reward`) is trained, and has its defaults if it is not given. Every other adapter
    needs a `path` and is frozen below it, in this order. For ppo, `value` is trained too, by default with the shape of
    the policy's adapter; with a `path` it is trained further."""
    reference: NonEmptyStr | None = None
    """Name of what the policy is compared with, as a check: `base`, or the frozen adapter directly below the policy.
    The reference is always the policy's stack without its top; any other value is refused."""
    data: DataConfig
    """The rows, and how they are read."""
    train: TrainingConfig = TrainingConfig()
    """The training loop."""
    reward: RewardModelConfig = RewardModelConfig()
    """Settings of `algorithm: reward`."""
    dpo: DPOConfig = DPOConfig()
    """Settings of `algorithm: dpo`."""
    rewards: Annotated[tuple[RewardConfig, ...], Field(strict=False)] = ()
    """Rewards of completions."""
    rewards_check: Literal["strict", "warn", "off"] = "strict"
    """Before training, the rewards score reference answers and wrong answers. If they do not separate the two, `strict`
    refuses to train and `warn` logs a warning; `off` skips the check."""
    rollout: RolloutConfig = RolloutConfig()
    """How completions are drawn in training."""
    grpo: GRPOConfig = GRPOConfig()
    """Settings of `algorithm: grpo`."""
    ppo: PPOConfig = PPOConfig()
    """Settings of `algorithm: ppo`."""
    evaluate: EvaluationConfig = EvaluationConfig()
    """Held-out measurements."""

    @property
    def trained_adapter(self) -> str:
        """The adapter that is trained."""
        return default_adapter_name(self.algorithm)

    @property
    def extra_adapters(self) -> tuple[str, ...]:
        """The adapters that are in no policy's stack, except the reward model's."""
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
        """Tokens of the longest row by the settings, whatever the data contains: of training rows, and of held-out
        answers, whose prompts count with `data.max_prompt_length`."""
        if self.evaluate.eval_dataset is None:
            return self.max_train_length
        return max(self.max_train_length, self.data.max_prompt_length + self.evaluate.max_new_tokens)

    @property
    def metric_for_best_model(self) -> str:
        """The metric that selects the best step."""
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
        adapters = data.get("adapters", {})
        name = default_adapter_name(data.get("algorithm"))
        if name in adapters:
            return data
        return {**data, "adapters": {**adapters, name: {}}}

    @model_validator(mode="before")
    @classmethod
    def _with_learning_rate(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if isinstance(algorithm := data.get("algorithm"), str):
            rate = DEFAULT_LEARNING_RATES.get(algorithm)
        else:
            rate = None
        train = data.get("train", {})
        if rate is None:
            return data
        if isinstance(train, TrainingConfig) and "learning_rate" not in train.model_fields_set:
            return {**data, "train": train.model_copy(update={"learning_rate": rate})}
        if isinstance(train, dict) and "learning_rate" not in train:
            return {**data, "train": {**train, "learning_rate": rate}}
        return data
