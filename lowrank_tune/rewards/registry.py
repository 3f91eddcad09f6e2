"""From a recipe's `rewards` to rewards with names and weights, and from their scores to the figure that trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lowrank_tune.config import RewardConfig
from lowrank_tune.errors import ConfigError, ConfigProblem, TrainingError, UserError, did_you_mean
from lowrank_tune.rewards.base import Reward, Score
from lowrank_tune.rewards.code.python_tests import PythonTestsReward
from lowrank_tune.rewards.formal.lean import make_lean
from lowrank_tune.rewards.formal.smt import SmtReward
from lowrank_tune.rewards.math.answer import AnswerReward
from lowrank_tune.rewards.math.math_answer import make_math_answer
from lowrank_tune.rewards.math.symbolic import make_symbolic
from lowrank_tune.rewards.reward_model import RewardModel
from lowrank_tune.rewards.text.json_schema import read_schema, require_package
from lowrank_tune.rewards.text.length import LengthReward
from lowrank_tune.rewards.text.regex_reward import RegexReward
from lowrank_tune.rewards.text.repetition import NGRAM, RepetitionReward
from lowrank_tune.rewards.user_function import UserFunctionReward, is_user_function, read_user_function


@dataclass(frozen=True)
class WeightedReward:
    """A reward under a name of its own, what it counts for, and what becomes of a completion on which it fails. `kind`:
    what the recipe makes of it, where that is not what the reward itself is."""

    name: str
    weight: float
    reward: Reward
    on_error: Literal["stop", "drop"] = "drop"
    kind: Literal["verifier", "shaping"] | None = None

    @property
    def is_verifier(self) -> bool:
        """Whether it decides which answers are right."""
        if self.kind is None:
            return self.reward.is_verifier
        return self.kind == "verifier"

    @property
    def must_separate(self) -> bool:
        """Whether it has to separate reference answers from wrong ones by itself: a user's function only where the
        recipe calls it a verifier, for else the weighted sum decides."""
        return self.is_verifier and (self.kind is not None or not isinstance(self.reward, UserFunctionReward))


def build_rewards(configs: Sequence[RewardConfig], folder: Path) -> list[WeightedReward]:
    """The rewards of a recipe; files of functions are looked for from `folder`. Raises ConfigError with everything that
    is wrong."""
    if not configs:
        raise UserError("`rewards` is empty; name at least one, as `[{name: answer}]`")
    rewards = []
    faults = []
    for index, (config, name) in enumerate(zip(configs, reward_names(configs), strict=True)):
        try:
            rewards.append(
                WeightedReward(
                    name,
                    config.weight,
                    _build_reward(config, name, folder),
                    config.on_error or ("stop" if is_user_function(config.name) else "drop"),
                    config.kind,
                )
            )
        except UserError as error:
            faults.append(ConfigProblem(str(error), f"rewards.{index}"))
    if faults:
        raise ConfigError(faults)
    return _with_default_kinds(rewards)


def _with_default_kinds(rewards: Sequence[WeightedReward]) -> list[WeightedReward]:
    """The rewards, where a user's function beside a verifier is shaping unless the recipe gives another kind."""
    if not any(reward.must_separate for reward in rewards):
        return list(rewards)
    return [
        replace(reward, kind="shaping")
        if reward.kind is None and isinstance(reward.reward, UserFunctionReward)
        else reward
        for reward in rewards
    ]


def reward_names(configs: Sequence[RewardConfig]) -> list[str]:
    """What the screen calls each: its word, or its function; a second one of a name is `answer-2`."""
    seen: Counter[str] = Counter()
    names = []
    for config in configs:
        if is_user_function(config.name):
            word = config.name.rpartition(":")[2]
        else:
            word = config.name
        seen[word] += 1
        names.append(word if seen[word] == 1 else f"{word}-{seen[word]}")
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
    """Each reward has the settings that it needs and no others."""
    for setting, owners in SETTING_OWNER.items():
        value = getattr(config, setting)
        if config.name in owners and value is None and setting not in OPTIONAL_SETTINGS:
            raise UserError(f"`{config.name}` needs `{setting}`")
        if config.name not in owners and value is not None:
            raise UserError(
                f"`{setting}` does nothing for `{config.name}`; it belongs to "
                f"{' and '.join(f'`{owner}`' for owner in owners)}"
            )
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
    require_package(name, "z3", "z3-solver")
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
"""How each reward that a recipe can name is made, from its settings, its name on the screen, and the folder of its
files."""
SETTING_OWNER: Mapping[str, tuple[str, ...]] = {
    "pattern": ("format", "regex"),
    "target_tokens": ("length",),
    "ngram": ("repetition",),
    "accept_unsafe_code": ("python_tests",),
    "json_schema": ("json_schema",),
    "answer_type": ("smt",),
    "program": ("lean",),
}
"""Whose each setting of `RewardConfig` is; it is needed there unless it is in OPTIONAL_SETTINGS, and a fault
elsewhere."""
OPTIONAL_SETTINGS: frozenset[str] = frozenset({"accept_unsafe_code", "ngram", "program"})


def total(scores: Sequence[Score], weights: Sequence[float]) -> float:
    """The weighted sum of a completion's scores.

    A score without a value, an error or a timeout, raises TrainingError: a reward that could not tell never counts as
    wrong.
    """
    for score in scores:
        if score.value is None:
            raise TrainingError(f"rewards: {score.reason or score.verdict}")
    return sum(weight * score.value for score, weight in zip(scores, weights, strict=True) if score.value is not None)
