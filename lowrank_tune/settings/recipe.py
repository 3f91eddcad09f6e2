"""A whole recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lowrank_tune.settings.common import Line, RunName, Settings
from lowrank_tune.settings.data import Data
from lowrank_tune.settings.model import Adapter, Base, aside, trained_by
from lowrank_tune.settings.preferences import Dpo, RewardModel
from lowrank_tune.settings.rewards import RewardUse
from lowrank_tune.settings.rollouts import Grpo, Ppo, Rollout
from lowrank_tune.settings.train import Evaluate, Train


class Recipe(Settings):
    """One run, complete."""

    name: RunName = ""
    """Name of the run and of its folder under `runs/`; the recipe file's name where it is not given."""
    description: str = ""
    """One line for `lowrank-tune presets`."""
    algorithm: Literal["sft", "reward", "dpo", "ppo", "grpo"]
    """What is optimised."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seeds everything."""
    base: Base = Base()
    """The frozen base."""
    adapters: dict[str, Adapter] = Field(
        default_factory=dict, json_schema_extra={"propertyNames": {"pattern": "^[a-z][a-z0-9_]{0,39}$"}}
    )
    """`policy` (for a reward model: `reward`) is trained; every other one needs a `path` and lies frozen below it, in
    this order. For ppo `value` is trained too, by default in the policy's shape; with a `path` it goes on from
    there."""
    reference: Line | None = None
    """What the policy is held to and compared with, as a check: `base`, or the frozen adapter right below the policy.
    It is always the policy's stack without its top; a recipe that says otherwise is refused."""
    data: Data
    """What is trained on."""
    train: Train = Train()
    """The loop."""
    reward: RewardModel = RewardModel()
    """What `algorithm: reward` optimises."""
    dpo: Dpo = Dpo()
    """What `algorithm: dpo` optimises."""
    rewards: Annotated[tuple[RewardUse, ...], Field(strict=False)] = ()
    """What completions earn."""
    rollout: Rollout = Rollout()
    """How completions are drawn while training."""
    grpo: Grpo = Grpo()
    """What `algorithm: grpo` optimises."""
    ppo: Ppo = Ppo()
    """What `algorithm: ppo` optimises."""
    evaluate: Evaluate = Evaluate()
    """Held-out measurements."""

    @property
    def trained(self) -> str:
        """The adapter that is trained."""
        return trained_by(self.algorithm)

    @property
    def aside(self) -> tuple[str, ...]:
        """The adapters that lie in no policy's stack, but for the reward model's."""
        return aside(self.algorithm)

    @property
    def pairs(self) -> bool:
        """Whether a row of the data is a chosen and a rejected answer."""
        return self.algorithm in ("reward", "dpo")

    @property
    def needs_gold(self) -> bool:
        """Whether a reward compares completions with gold answers."""
        return any(reward.use == "answer" for reward in self.rewards)

    @property
    def best_by(self) -> str:
        """What makes a step the best."""
        return self.evaluate.best_by or (
            "exact" if self.algorithm in ("grpo", "ppo") and self.evaluate.heldout else "loss"
        )

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data; `recipe.load` of it gives this recipe again."""
        return self.model_dump(mode="json", exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _trained_by_default(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("adapters", {}), dict):
            return data
        adapters, name = data.get("adapters", {}), trained_by(data.get("algorithm"))
        return data if name in adapters else {**data, "adapters": {**adapters, name: {}}}
