"""Rules of the learned reward, `name: reward_model`: it speaks through an adapter of its own, `adapters.reward`. Like
`rules`, of plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_tune.config.model import default_adapter_name
from lowrank_tune.config.raw_settings import Finding, entries, get_raw

REWARD_NAME = "reward_model"
REWARD_ADAPTER = "reward"


def uses_reward_model(data: Any) -> bool:
    """Whether a reward of these is learned."""
    return any(get_raw(reward, "name") == REWARD_NAME for reward in entries(data, "rewards"))


def findings(data: Any, has_reward_stage: bool = False) -> Iterator[Finding]:
    """The reward model is there where it is asked, and only there. `has_reward_stage`: an earlier stage of a chain
    trains it."""
    if (
        not isinstance(get_raw(data, "algorithm"), str)
        or default_adapter_name(get_raw(data, "algorithm")) == REWARD_ADAPTER
    ):
        return
    given = get_raw(data, "adapters", REWARD_ADAPTER)
    if get_raw(given, "path") is not None and not uses_reward_model(
        data
    ):  # without a path it is none, and that is told already
        yield (
            ("adapters", REWARD_ADAPTER),
            f"does nothing without the reward `{REWARD_NAME}`; no other stack takes the adapter of a reward model",
        )
    for index, reward in enumerate(entries(data, "rewards")):
        if given is None and not has_reward_stage and get_raw(reward, "name") == REWARD_NAME:
            yield (
                ("rewards", index, "name"),
                f"needs a reward model: `adapters: {{{REWARD_ADAPTER}: {{path: runs/NAME}}}}`, a run of "
                "`algorithm: reward`",
            )
