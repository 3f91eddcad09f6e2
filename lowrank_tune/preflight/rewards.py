"""The rewards of a recipe: made as in the run, and a user's functions loaded in a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lowrank_tune.config.raw_settings import Finding
from lowrank_tune.errors import ConfigError, UserError
from lowrank_tune.preflight.stages import PlannedStage
from lowrank_tune.rewards import Reward, WorkerPool, build_rewards
from lowrank_tune.rewards.base import WorkerReward
from lowrank_tune.rewards.user_function import UserFunctionReward


def reward_findings(stage: PlannedStage) -> Iterator[Finding]:
    """Yields the rewards whose files, programs or packages are missing, or whose functions cannot be loaded."""
    for index, config in enumerate(stage.recipe.rewards):
        try:
            (weighted,) = build_rewards([config], Path.cwd())
            _check_worker(weighted.reward)
        except ConfigError as error:
            for problem in error.problems:
                yield ("rewards", index, "name"), problem.message
        except UserError as error:
            yield ("rewards", index, "name"), str(error)


def _check_worker(reward: Reward) -> None:
    """Raises UserError if a worker could not compute the reward. A user's file runs here once, as in every worker of
    the run."""
    if isinstance(reward, UserFunctionReward):
        try:
            WorkerPool[int]([reward], workers=1).close()
        except ConfigError as error:
            raise UserError("; ".join(map(str, error.problems))) from error
    elif isinstance(reward, WorkerReward):
        reward.worker_spec()
