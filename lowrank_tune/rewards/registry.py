"""Builds the rewards that a recipe lists under `rewards`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lowrank_tune.config import RewardConfig
from lowrank_tune.errors import ConfigError, ConfigProblem, UserError
from lowrank_tune.rewards.base import Reward, require_packages
from lowrank_tune.rewards.code.python_tests import PythonTestsReward
from lowrank_tune.rewards.formal.lean import make_lean
from lowrank_tune.rewards.formal.smt import SmtReward
from lowrank_tune.rewards.math.answer import AnswerReward
from lowrank_tune.rewards.math.math_answer import make_math_answer
from lowrank_tune.rewards.math.symbolic import make_symbolic
from lowrank_tune.rewards.reward_model import RewardModel
from lowrank_tune.rewards.text.json_schema import read_schema
from lowrank_tune.rewards.text.length import LengthReward
from lowrank_tune.rewards.text.regex_reward import RegexReward
from lowrank_tune.rewards.text.repetition import NGRAM, RepetitionReward
from lowrank_tune.rewards.user_function import UserFunctionReward, read_user_function
from lowrank_tune.rewards.weighted import WeightedReward


def build_rewards(configs: Sequence[RewardConfig], folder: Path) -> list[WeightedReward]:
    """Returns the rewards of a recipe; paths of functions and schemas are relative to `folder`. Raises ConfigError with
    all problems at once."""
    if not configs:
        raise UserError("`rewards` is empty; name at least one, as `[{name: answer}]`")
    rewards = []
    problems = []
    for index, (config, name) in enumerate(
        zip(
            configs,
            reward_names(configs),
            strict=True,
        )
    ):
        try:
            reward = _build_reward(config, name, folder)
        except UserError as error:
            problems.append(ConfigProblem(str(error), f"rewards.{index}"))
            continue
        rewards.append(
            WeightedReward(
                name,
                config.weight,
                reward,
                "stop" if config.stops_on_error else "drop",
                config.kind,
            )
        )
    if problems:
        raise ConfigError(problems)
    return _with_default_kinds(rewards)


def _with_default_kinds(rewards: Sequence[WeightedReward]) -> list[WeightedReward]:
    """Returns the rewards; a user's function beside a verifier is shaping unless the recipe sets its kind."""
    if not any(reward.must_separate for reward in rewards):
        return list(rewards)
    result = []
    for reward in rewards:
        if reward.kind is None and isinstance(reward.reward, UserFunctionReward):
            reward = replace(reward, kind="shaping")
        result.append(reward)
    return result


def reward_names(configs: Sequence[RewardConfig]) -> list[str]:
    """Returns the unique name of each reward: its `name` or its function's, and `answer-2` for a second `answer`."""
    seen: Counter[str] = Counter()
    names = []
    for config in configs:
        name = config.name.rpartition(":")[2] if config.is_custom else config.name
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _build_reward(
    config: RewardConfig,
    name: str,
    folder: Path,
) -> Reward:
    _check_settings(config)
    if config.is_custom:
        return read_user_function(name, config.name, folder)
    return _make_builtin(config, name, folder)


def _check_settings(config: RewardConfig) -> None:
    """Raises UserError with the first finding about the settings of a reward. Those of a recipe were checked before; a
    reward of the command line or of Python code was not."""
    for (key, *_), message in config.findings():
        subject = config.name if key == "name" else key
        raise UserError(f"`{subject}` {message}")
    if config.weight == 0:
        raise UserError(f"`{config.name}` has weight 0 and would change nothing; leave it out")


def _make_builtin(
    config: RewardConfig,
    name: str,
    folder: Path,
) -> Reward:
    """Returns a built-in reward under its unique name. Raises UserError."""
    match config.name:
        case "answer":
            return AnswerReward(name)
        case "math_answer":
            return make_math_answer(name)
        case "symbolic":
            return make_symbolic(name)
        case "format" | "regex":
            assert config.pattern is not None
            return RegexReward(
                name,
                config.pattern,
                full_match=config.name == "format",
            )
        case "json_schema":
            assert config.json_schema is not None
            return read_schema(name, config.json_schema, folder)
        case "length":
            assert config.target_tokens is not None
            return LengthReward(name, config.target_tokens)
        case "repetition":
            return RepetitionReward(name, NGRAM if config.ngram is None else config.ngram)
        case "python_tests":
            return PythonTestsReward(name, config.accept_unsafe_code is not None)
        case "reward_model":
            return RewardModel(name)
        case "smt":
            assert config.answer_type is not None
            require_packages(name, "z3")
            return SmtReward(name, config.answer_type)
    assert config.name == "lean", f"{config.name} is not a built-in reward"
    return make_lean(name, config.program)
