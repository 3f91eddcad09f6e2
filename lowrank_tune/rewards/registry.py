"""Builds the rewards that a recipe lists under `rewards`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lowrank_tune.config import RewardConfig
from lowrank_tune.errors import ConfigError, ConfigProblem, UserError, did_you_mean
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
from lowrank_tune.rewards.user_function import UserFunctionReward, is_user_function, read_user_function
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
        on_error = config.on_error or ("stop" if is_user_function(config.name) else "drop")
        rewards.append(
            WeightedReward(
                name,
                config.weight,
                reward,
                on_error,
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
        name = config.name.rpartition(":")[2] if is_user_function(config.name) else config.name
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _build_reward(config: RewardConfig, name: str, folder: Path) -> Reward:
    if not is_user_function(config.name) and config.name not in REWARD_BUILDERS:
        choices = f"Known are {', '.join(REWARD_BUILDERS)}, and `./file.py:function`"
        raise UserError(f"unknown reward `{config.name}`{did_you_mean(config.name, tuple(REWARD_BUILDERS))} {choices}")
    _check_settings(config)
    if is_user_function(config.name):
        return read_user_function(name, config.name, folder)
    return REWARD_BUILDERS[config.name](config, name, folder)


def _check_settings(config: RewardConfig) -> None:
    """Raises UserError if a setting that the reward needs is missing, or one of another reward is given."""
    for setting, owners in SETTING_OWNER.items():
        value = getattr(config, setting)
        if config.name in owners:
            if value is None and setting not in OPTIONAL_SETTINGS:
                raise UserError(f"`{config.name}` needs `{setting}`")
        elif value is not None:
            owner_names = " and ".join(f"`{owner}`" for owner in owners)
            raise UserError(f"`{setting}` does nothing for `{config.name}`; it belongs to {owner_names}")
    if config.weight == 0:
        raise UserError(f"`{config.name}` has weight 0 and would change nothing; leave it out")


def _answer(config: RewardConfig, name: str, folder: Path) -> Reward:
    return AnswerReward(name)


def _math_answer(config: RewardConfig, name: str, folder: Path) -> Reward:
    return make_math_answer(name)


def _python_tests(config: RewardConfig, name: str, folder: Path) -> Reward:
    return PythonTestsReward(name, config.accept_unsafe_code is not None)


def _reward_model(config: RewardConfig, name: str, folder: Path) -> Reward:
    return RewardModel(name)


def _symbolic(config: RewardConfig, name: str, folder: Path) -> Reward:
    return make_symbolic(name)


def _length(config: RewardConfig, name: str, folder: Path) -> Reward:
    assert config.target_tokens is not None
    return LengthReward(name, config.target_tokens)


def _format(config: RewardConfig, name: str, folder: Path) -> Reward:
    assert config.pattern is not None
    try:
        return RegexReward(name, config.pattern, full_match=config.name == "format")
    except UserError as error:
        raise UserError(f"`pattern` {error}") from None


def _repetition(config: RewardConfig, name: str, folder: Path) -> Reward:
    return RepetitionReward(name, NGRAM if config.ngram is None else config.ngram)


def _json_schema(config: RewardConfig, name: str, folder: Path) -> Reward:
    assert config.json_schema is not None
    return read_schema(name, config.json_schema, folder)


def _smt(config: RewardConfig, name: str, folder: Path) -> Reward:
    assert config.answer_type is not None
    require_packages(name, "z3")
    return SmtReward(name, config.answer_type)


def _lean(config: RewardConfig, name: str, folder: Path) -> Reward:
    return make_lean(name, config.program)


REWARD_BUILDERS: Mapping[str, Callable[[RewardConfig, str, Path], Reward]] = {
    "answer": _answer,
    "math_answer": _math_answer,
    "symbolic": _symbolic,
    "format": _format,
    "regex": _format,
    "json_schema": _json_schema,
    "length": _length,
    "repetition": _repetition,
    "python_tests": _python_tests,
    "reward_model": _reward_model,
    "smt": _smt,
    "lean": _lean,
}
"""Builds each built-in reward from its settings, its unique name, and the folder to which its paths are relative."""
SETTING_OWNER: Mapping[str, tuple[str, ...]] = {
    "pattern": ("format", "regex"),
    "target_tokens": ("length",),
    "ngram": ("repetition",),
    "accept_unsafe_code": ("python_tests",),
    "json_schema": ("json_schema",),
    "answer_type": ("smt",),
    "program": ("lean",),
}
"""The rewards that each special setting of `RewardConfig` belongs to. They need it, unless it is in OPTIONAL_SETTINGS;
for other rewards it is a fault."""
OPTIONAL_SETTINGS: frozenset[str] = frozenset({"accept_unsafe_code", "ngram", "program"})
