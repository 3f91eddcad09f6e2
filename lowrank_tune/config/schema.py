"""The settings of a whole recipe, and which of them each algorithm uses.

A new algorithm adds its name to `AlgorithmName`, `DEFAULT_LEARNING_RATES` and `ROW_ALGORITHMS` or `ONLINE_ALGORITHMS`,
its section to `RecipeConfig`, and rows to `USED_BY`. Two new settings that exclude each other add a row to
`MUTUALLY_EXCLUSIVE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, PrivateAttr, model_validator

from lowrank_tune.config.base import NonEmptyStr, Path, RunName, Settings
from lowrank_tune.config.data import DataConfig, SourceConfig
from lowrank_tune.config.dpo import DPOConfig
from lowrank_tune.config.evaluation import EvaluationConfig
from lowrank_tune.config.grpo import GRPOConfig
from lowrank_tune.config.kto import KTOConfig
from lowrank_tune.config.model import NAME_PATTERN, AdapterConfig, BaseConfig, default_adapter_name, extra_adapters
from lowrank_tune.config.ppo import PPOConfig
from lowrank_tune.config.reward_model import RewardModelConfig
from lowrank_tune.config.rewards import REWARD_MODEL, RewardConfig
from lowrank_tune.config.rollout import RolloutConfig
from lowrank_tune.config.training import TrainingConfig
from lowrank_tune.config.yaml import Node, SourceTree
from lowrank_tune.errors import ConfigProblem

AlgorithmName = Literal["sft", "reward", "dpo", "kto", "ppo", "grpo"]
ALGORITHMS: tuple[str, ...] = get_args(AlgorithmName)
DEFAULT_LEARNING_RATES = {
    "sft": 2e-4,
    "reward": 1e-4,
    "dpo": 5e-6,
    "kto": 5e-6,
    "grpo": 1e-5,
    "ppo": 1e-5,
}
"""Peak learning rates for LoRA if a recipe gives none; docs/preset-choices.md has the sources."""
HELDOUT: Path = ("evaluate", "eval_dataset")
"""The path of the source of held-out prompts."""
ROW_ALGORITHMS = ("sft", "reward", "dpo", "kto")
"""The algorithms that learn from rows as they are."""
PAIR_ALGORITHMS = ("reward", "dpo")
"""The algorithms whose rows are pairs of answers."""
LABEL_ALGORITHMS = ("kto",)
"""The algorithms whose rows are answers with a label."""
ONLINE_ALGORITHMS = ("grpo", "ppo")
"""The algorithms that learn from completions that they draw."""
USED_BY: dict[str, tuple[str, ...]] = {
    "train.global_batch_size": ROW_ALGORITHMS,
    "train.tokens_per_step": ROW_ALGORITHMS,
    "train.length_window": ROW_ALGORITHMS,
    "train.prompts_per_step": ONLINE_ALGORITHMS,
    "data.max_length": ROW_ALGORITHMS,
    "data.max_prompt_length": ONLINE_ALGORITHMS,
    "data.truncation": ROW_ALGORITHMS,
    "data.validation": ROW_ALGORITHMS,
    "data.eval_fraction": ROW_ALGORITHMS,
    "data.eval_rows": ROW_ALGORITHMS,
    "data.expected_tokens": ROW_ALGORITHMS,
    "reference": ("sft", "dpo", "kto", *ONLINE_ALGORITHMS),
    "reward": ("reward",),
    "dpo": ("dpo",),
    "kto": ("kto",),
    "rewards": ONLINE_ALGORITHMS,
    "rewards_check": ONLINE_ALGORITHMS,
    "rollout.num_generations": ONLINE_ALGORITHMS,
    "rollout.max_new_tokens": ONLINE_ALGORITHMS,
    "rollout.temperature": ONLINE_ALGORITHMS,
    "rollout.max_num_seqs": ONLINE_ALGORITHMS,
    "rollout.max_reward_failure_rate": ONLINE_ALGORITHMS,
    "evaluate.on_reward_hacking": ONLINE_ALGORITHMS,
    "grpo": ("grpo",),
    "ppo": ("ppo",),
}
"""Settings and whole sections that only some algorithms use. All algorithms use the others."""
REPLACEMENTS = {
    "train.global_batch_size": "`train.prompts_per_step`",
    "train.prompts_per_step": "`train.global_batch_size`",
    "data.max_length": "`data.max_prompt_length` and `rollout.max_new_tokens`",
    "data.max_prompt_length": "`data.max_length`, which limits a prompt and its answer together",
    "data.validation": "`evaluate.eval_dataset`",
    "reward": "`rewards`",
    "rewards": "`reward`",
}
"""Settings with the same purpose, for the algorithms that do not use a setting."""
MUTUALLY_EXCLUSIVE: tuple[tuple[Path, Path], ...] = (
    (("train", "max_steps"), ("train", "num_train_epochs")),
    (("train", "global_batch_size"), ("train", "tokens_per_step")),
    (("train", "micro_batch_size"), ("train", "micro_batch_tokens")),
    (("data", "validation"), ("data", "eval_fraction")),
    (("data", "validation"), ("data", "eval_rows")),
    (("data", "eval_rows"), ("data", "eval_fraction")),
)
"""Pairs of settings that exclude each other. Both in one layer are an error; a later layer replaces the earlier one."""


class RecipeConfig(Settings):
    """One complete run."""

    name: RunName = ""
    """Name of the run and of its folder under `runs/`. Default: the name of the recipe file."""
    description: str = ""
    """One line for `lowrank-tune presets`."""
    algorithm: AlgorithmName
    """The training algorithm."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of all random draws."""
    base: BaseConfig = BaseConfig()
    """The frozen base."""
    adapters: dict[str, AdapterConfig] = Field(
        default_factory=dict, json_schema_extra={"propertyNames": {"pattern": f"^{NAME_PATTERN.pattern}$"}}
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
    kto: KTOConfig = KTOConfig()
    """Settings of `algorithm: kto`."""
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

    _source: SourceTree = PrivateAttr(default_factory=SourceTree)

    def with_source(self, tree: Node) -> Self:
        """Returns this recipe, with the tree that its settings were read from."""
        self._source = SourceTree(tree)
        return self

    def problem(
        self,
        path: Path,
        message: str,
    ) -> ConfigProblem:
        """Returns a problem of a setting, at its line, or at the line of its section if it is not written."""
        return self._source.root.problem(message, path)

    @property
    def source_file(self) -> str:
        """The file that it was read from; an empty string if it was made in Python."""
        return self._source.root.position.file

    @property
    def stages(self) -> tuple[Self, ...]:
        """The recipe itself, as a chain of one stage."""
        return (self,)

    @property
    def trained_adapter(self) -> str:
        """The adapter that is trained."""
        return default_adapter_name(self.algorithm)

    @property
    def extra_adapters(self) -> tuple[str, ...]:
        """The adapters that are in no policy's stack, except the reward model's."""
        return extra_adapters(self.algorithm)

    @property
    def trained_adapters(self) -> tuple[str, ...]:
        """All adapters that are trained: that of the policy or the reward model first, then PPO's value."""
        return (self.trained_adapter, *self.extra_adapters)

    def sources(self) -> Iterator[tuple[Path, SourceConfig]]:
        """Yields every source with its path: of training, of validation, and of held-out prompts."""
        for index, source in enumerate(self.data.train):
            yield ("data", "train", index), source
        for index, source in enumerate(self.data.validation):
            yield ("data", "validation", index), source
        if self.evaluate.eval_dataset is not None:
            yield HELDOUT, self.evaluate.eval_dataset

    @property
    def is_online(self) -> bool:
        """Whether the algorithm learns from completions that it draws."""
        return self.algorithm in ONLINE_ALGORITHMS

    @property
    def uses_pairs(self) -> bool:
        """Whether a row of the data is a chosen and a rejected answer."""
        return self.algorithm in PAIR_ALGORITHMS

    @property
    def uses_labels(self) -> bool:
        """Whether a row of the data is an answer with a label."""
        return self.algorithm in LABEL_ALGORITHMS

    @property
    def needs_ground_truth(self) -> bool:
        """Whether a reward compares completions with gold answers."""
        return any(reward.name == "answer" for reward in self.rewards)

    @property
    def uses_reward_model(self) -> bool:
        """Whether a reward is the score of a reward model."""
        return any(reward.name == REWARD_MODEL for reward in self.rewards)

    @property
    def max_train_length(self) -> int:
        """Tokens of the longest row that is trained on."""
        if self.is_online:
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
        if self.evaluate.metric_for_best_model is not None:
            return self.evaluate.metric_for_best_model
        if self.is_online and self.evaluate.eval_dataset is not None:
            return "accuracy"
        return "loss"

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data; `recipe.load` of it gives this recipe again."""
        return self.model_dump(mode="json", exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _add_trained_adapter(cls, data: Any) -> Any:
        """Adds the trained adapter with its defaults."""
        if not isinstance(data, dict) or not isinstance(data.get("adapters", {}), dict):
            return data
        adapters = {**data.get("adapters", {})}
        adapters.setdefault(default_adapter_name(data.get("algorithm")), {})
        return {**data, "adapters": adapters}

    @model_validator(mode="before")
    @classmethod
    def _add_learning_rate(cls, data: Any) -> Any:
        """Adds the learning rate of the algorithm."""
        if not isinstance(data, dict) or data.get("algorithm") not in ALGORITHMS:
            return data
        rate = DEFAULT_LEARNING_RATES[data["algorithm"]]
        train = data.get("train", {})
        if isinstance(train, TrainingConfig) and "learning_rate" not in train.model_fields_set:
            return {**data, "train": train.model_copy(update={"learning_rate": rate})}
        if isinstance(train, dict) and "learning_rate" not in train:
            return {**data, "train": {**train, "learning_rate": rate}}
        return data
