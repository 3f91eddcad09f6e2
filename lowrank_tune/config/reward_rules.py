"""Rules of what completions earn, and of `algorithm: grpo`: which settings do nothing beside others. Like `rules`, of
plain data."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args

from lowrank_tune.config.raw_settings import Finding, entries, get_raw, number
from lowrank_tune.config.rollouts import GRPOConfig
from lowrank_tune.errors import UserError
from lowrank_tune.regex import compile_pattern

GENERATIVE_ALGORITHMS = ("grpo", "ppo")
"""The algorithms that learn from completions of their own."""
REWARDS = (
    "answer",
    "math_answer",
    "symbolic",
    "python_tests",
    "smt",
    "lean",
    "format",
    "regex",
    "json_schema",
    "length",
    "repetition",
    "reward_model",
)
REWARD_SETTINGS = {
    "pattern": (
        ("format", "regex"),
        "the regular expression that the whole completion must match, as '(?s).*Answer: .*'",
    ),
    "target_tokens": (("length",), "up to how many tokens earn 1"),
    "ngram": (("repetition",), ""),
    "json_schema": (("json_schema",), "the schema, or where it is, as `./schema.json`"),
    "accept_unsafe_code": (("python_tests",), ""),
    "answer_type": (("smt",), "what a completion contains: `statement`, `witness` or `invariant`"),
    "program": (("lean",), ""),
}
"""Settings of a reward: whose they are, and what they say. Those need it, unless there is nothing to say, and no other
has it."""
REWARD_ALIASES = {
    "accuracy": "answer",
    "accuracy_reward": "answer",
    "correctness": "answer",
    "exact_match": "answer",
    "think_format_reward": "format",
}
"""Names of other kits' rewards."""
LOSSES = get_args(GRPOConfig.model_fields["loss_type"].annotation)
"""Losses that have an `epsilon_high` of their own where none is given: `epsilon` says nothing of it."""


def is_grpo(data: Any) -> bool:
    return bool(get_raw(data, "algorithm") == "grpo")


def is_online(data: Any) -> bool:
    """Whether it learns from completions of its own."""
    return get_raw(data, "algorithm") in GENERATIVE_ALGORITHMS


def unused_settings(data: Any) -> Iterator[Finding]:
    """Settings that were written and do nothing beside others."""
    if is_grpo(data):
        yield from _unused_clip_settings(data)
        yield from _unused_kl_settings(data)
        if get_raw(data, "grpo", "missing_eos_penalty") is not None and get_raw(
            data,
            "grpo",
            "truncated_completions",
        ) in (
            None,
            "keep",
            "mask",
        ):
            yield ("grpo", "missing_eos_penalty"), "does nothing without `grpo.truncated_completions`: penalize"
    if is_online(data):
        listed = [
            get_raw(reward, "on_error") or ("stop" if _is_custom(get_raw(reward, "name")) else "drop")
            for reward in entries(data, "rewards")
        ]
        if listed and set(listed) == {"stop"} and get_raw(data, "rollout", "max_reward_failure_rate") is not None:
            yield (
                ("rollout", "max_reward_failure_rate"),
                "does nothing where every reward stops the run at its first failure (`on_error`)",
            )
        for index, reward in enumerate(entries(data, "rewards")):
            use = get_raw(reward, "name")
            for key, (owners, _) in REWARD_SETTINGS.items():
                if get_raw(reward, key) is not None and isinstance(use, str) and use not in owners:
                    yield (
                        ("rewards", index, key),
                        f"does nothing for this reward; it belongs to {' and '.join(f'`{owner}`' for owner in owners)}",
                    )


def _unused_clip_settings(data: Any) -> Iterator[Finding]:
    if get_raw(data, "grpo", "loss_type") == "cispo" and get_raw(data, "grpo", "epsilon") is not None:
        yield (
            ("grpo", "epsilon"),
            "does nothing for the loss cispo, which bounds weights from above alone; use `grpo.epsilon_high`",
        )


def _unused_kl_settings(data: Any) -> Iterator[Finding]:
    for key in ("kl_in_reward", "kl_estimator"):
        if get_raw(data, "grpo", key) is None:
            continue
        if number(get_raw(data, "grpo", "beta")) == 0.0:
            yield ("grpo", key), "does nothing where `grpo.beta` is 0"
        elif key == "kl_estimator" and get_raw(data, "grpo", "kl_in_reward") is True:
            yield (
                ("grpo", key),
                "does nothing with `grpo.kl_in_reward`, where the KL is the log-ratio of what was drawn",
            )


def reward_findings(data: Any) -> Iterator[Finding]:
    """Completions earn something, and every reward can be computed."""
    if not is_online(data):
        return
    if get_raw(data, "rewards") in (None, []):
        yield ("rewards",), "is missing: say what completions earn, as in `rewards: [{name: answer}]`"
    listed = entries(data, "rewards")
    for index, reward in enumerate(listed):
        use = get_raw(reward, "name")
        if isinstance(use, str) and (reason := _invalid_reward(use)):
            yield ("rewards", index, "name"), reason
        for key, (owners, description) in REWARD_SETTINGS.items():
            if description and use in owners and get_raw(reward, key) is None:
                yield ("rewards", index, key), f"is missing: {description}"
        if (
            isinstance(pattern := get_raw(reward, "pattern"), str)
            and use in REWARD_SETTINGS["pattern"][0]
            and (reason := _invalid_pattern(pattern))
        ):
            yield ("rewards", index, "pattern"), reason
    weights = [1.0 if (weight := get_raw(reward, "weight")) is None else number(weight) for reward in listed]
    if listed and not any(weight is None or weight for weight in weights):
        yield ("rewards", 0, "weight"), "the weights of the rewards are all 0, so that nothing would be learned"


def _is_custom(use: Any) -> bool:
    return isinstance(use, str) and (":" in use or use.endswith(".py"))


def _invalid_reward(use: str) -> str:
    """Why a word names no reward, or an empty string."""
    if use in REWARDS:
        return ""
    if _is_custom(use):
        file, _, function = use.rpartition(":")
        if file.endswith(".py") and function.isidentifier():
            return ""
        return "is no function in a file; write it as `./file.py:function`"
    if use in REWARD_ALIASES:
        near = [REWARD_ALIASES[use]]
    else:
        near = get_close_matches(use[:80], REWARDS, n=1, cutoff=0.6)
    return "is no reward; " + (
        f"did you mean `{near[0]}`?" if near else f"there are {', '.join(REWARDS)} and your own, `./file.py:function`"
    )


def _invalid_pattern(pattern: str) -> str:
    """Why a text is no regular expression, or an empty string."""
    try:
        compile_pattern(pattern)
    except UserError as error:
        return str(error)
    return ""


def reward_needs_answers(data: Any) -> Iterator[Finding]:
    """Whether an answer is right cannot be told without gold answers."""
    if is_online(data) and any(get_raw(reward, "name") == "answer" for reward in entries(data, "rewards")):
        for index, source in enumerate(entries(data, "data", "train")):
            if get_raw(source, "ground_truth") == "none" and get_raw(source, "dataset") != "builtin:arithmetic":
                yield ("data", "train", index, "ground_truth"), "leaves the reward `answer` nothing to compare with"
