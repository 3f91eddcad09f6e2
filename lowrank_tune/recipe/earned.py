"""Rules of what completions earn, and of `algorithm: grpo`: which settings do nothing beside others. Like `rules`, of
plain data."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args

from lowrank_tune.errors import UserError
from lowrank_tune.patterns import compiled
from lowrank_tune.recipe.written import Finding, entries, number, written
from lowrank_tune.settings import Grpo

DRAWS = ("grpo", "ppo")
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
NEEDS = {
    "pattern": (
        ("format", "regex"),
        "the regular expression that the whole completion must match, as '(?s).*Answer: .*'",
    ),
    "target_tokens": (("length",), "up to how many tokens earn 1"),
    "ngram": (("repetition",), ""),
    "json_schema": (("json_schema",), "the schema, or where it is, as `./schema.json`"),
    "accept_unsafe_code": (("python_tests",), ""),
    "kind": (("smt",), "what a completion tells: `statement`, `witness` or `invariant`"),
    "program": (("lean",), ""),
}
"""Settings of a reward: whose they are, and what they say. Those need it, unless there is nothing to say, and no other
has it."""
MEANT = {
    "accuracy": "answer",
    "accuracy_reward": "answer",
    "correctness": "answer",
    "exact_match": "answer",
    "think_format_reward": "format",
}
"""Names of other kits' rewards."""
LOSSES = get_args(Grpo.model_fields["loss"].annotation)
OWN_HIGH = ("dapo", "cispo")
"""Losses that have a `clip_high` of their own where none is given: `clip` says nothing of it."""


def is_grpo(data: Any) -> bool:
    return bool(written(data, "algorithm") == "grpo")


def draws(data: Any) -> bool:
    """Whether it learns from completions of its own."""
    return written(data, "algorithm") in DRAWS


def idle(data: Any) -> Iterator[Finding]:
    """Settings that were written and do nothing beside others."""
    if is_grpo(data):
        yield from _idle_clips(data)
        yield from _idle_kl(data)
        if written(data, "grpo", "penalty") is not None and written(data, "grpo", "truncated") in (
            None,
            "keep",
            "mask",
        ):
            yield ("grpo", "penalty"), "does nothing without `grpo.truncated`: penalise"
    if draws(data):
        listed = [
            written(reward, "on_error") or ("stop" if _is_own(written(reward, "use")) else "drop")
            for reward in entries(data, "rewards")
        ]
        if listed and set(listed) == {"stop"} and written(data, "rollout", "max_unscored_share") is not None:
            yield (
                ("rollout", "max_unscored_share"),
                "does nothing where every reward stops the run at its first failure (`on_error`)",
            )
        for index, reward in enumerate(entries(data, "rewards")):
            use = written(reward, "use")
            for key, (owners, _) in NEEDS.items():
                if written(reward, key) is not None and isinstance(use, str) and use not in owners:
                    yield (
                        ("rewards", index, key),
                        f"does nothing for this reward; it belongs to {' and '.join(f'`{one}`' for one in owners)}",
                    )


def _idle_clips(data: Any) -> Iterator[Finding]:
    loss = written(data, "grpo", "loss") or "grpo"
    clip, low, high = (written(data, "grpo", key) is not None for key in ("clip", "clip_low", "clip_high"))
    if loss == "cispo":
        for key in ("clip", "clip_low"):
            if written(data, "grpo", key) is not None:
                yield (
                    ("grpo", key),
                    "does nothing for the loss cispo, which bounds weights from above alone; say `grpo.clip_high`",
                )
    elif clip and low and high:
        yield ("grpo", "clip"), "does nothing beside `grpo.clip_low` and `grpo.clip_high`: give it, or the two"
    elif clip and low and loss in OWN_HIGH:
        yield (
            ("grpo", "clip"),
            f"does nothing beside `grpo.clip_low`: the loss {loss} has a `grpo.clip_high` of its own",
        )


def _idle_kl(data: Any) -> Iterator[Finding]:
    for key in ("kl_in", "kl_estimator"):
        if written(data, "grpo", key) is None:
            continue
        if number(written(data, "grpo", "kl")) == 0.0:
            yield ("grpo", key), "does nothing where `grpo.kl` is 0"
        elif key == "kl_estimator" and written(data, "grpo", "kl_in") == "reward":
            yield (
                ("grpo", key),
                "does nothing with `grpo.kl_in`: reward, where the KL is the log-ratio of what was drawn",
            )


def rewards(data: Any) -> Iterator[Finding]:
    """Completions earn something, and every reward can be computed."""
    if not draws(data):
        return
    if written(data, "rewards") in (None, []):
        yield ("rewards",), "is missing: say what completions earn, as in `rewards: [{use: answer}]`"
    listed = entries(data, "rewards")
    for index, reward in enumerate(listed):
        use = written(reward, "use")
        if isinstance(use, str) and (why := _no_reward(use)):
            yield ("rewards", index, "use"), why
        for key, (owners, says) in NEEDS.items():
            if says and use in owners and written(reward, key) is None:
                yield ("rewards", index, key), f"is missing: {says}"
        if (
            isinstance(pattern := written(reward, "pattern"), str)
            and use in NEEDS["pattern"][0]
            and (why := _no_pattern(pattern))
        ):
            yield ("rewards", index, "pattern"), why
    weights = [1.0 if (weight := written(reward, "weight")) is None else number(weight) for reward in listed]
    if listed and not any(weight is None or weight for weight in weights):
        yield ("rewards", 0, "weight"), "the weights of the rewards are all 0, so that nothing would be learned"


def _is_own(use: Any) -> bool:
    return isinstance(use, str) and (":" in use or use.endswith(".py"))


def _no_reward(use: str) -> str:
    """Why a word names no reward, or an empty string."""
    if use in REWARDS:
        return ""
    if _is_own(use):
        file, _, function = use.rpartition(":")
        return (
            ""
            if file.endswith(".py") and function.isidentifier()
            else "is no function in a file; write it as `./file.py:function`"
        )
    near = [MEANT[use]] if use in MEANT else get_close_matches(use[:80], REWARDS, n=1, cutoff=0.6)
    return "is no reward; " + (
        f"did you mean `{near[0]}`?" if near else f"there are {', '.join(REWARDS)} and your own, `./file.py:function`"
    )


def _no_pattern(pattern: str) -> str:
    """Why a text is no regular expression, or an empty string."""
    try:
        compiled(pattern)
    except UserError as error:
        return str(error)
    return ""


def golds(data: Any) -> Iterator[Finding]:
    """Whether an answer is right cannot be told without gold answers."""
    if draws(data) and any(written(reward, "use") == "answer" for reward in entries(data, "rewards")):
        for index, source in enumerate(entries(data, "data", "train")):
            if written(source, "gold") == "none" and written(source, "dataset") != "tutor":
                yield ("data", "train", index, "gold"), "leaves the reward `answer` nothing to compare with"
