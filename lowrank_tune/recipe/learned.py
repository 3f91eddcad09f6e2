"""Rules of the learned reward, `use: reward_model`: it speaks through an adapter of its own, `adapters.reward`. Like
`rules`, of plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_tune.recipe.written import Finding, entries, written
from lowrank_tune.settings import trained_by

USE, ROLE = "reward_model", "reward"


def asks(data: Any) -> bool:
    """Whether a reward of these is learned."""
    return any(written(reward, "use") == USE for reward in entries(data, "rewards"))


def findings(data: Any, lent: bool = False) -> Iterator[Finding]:
    """The reward model is there where it is asked, and only there. `lent`: an earlier stage of a chain trains it."""
    if not isinstance(written(data, "algorithm"), str) or trained_by(written(data, "algorithm")) == ROLE:
        return
    given = written(data, "adapters", ROLE)
    if written(given, "path") is not None and not asks(data):  # without a path it is none, and that is told already
        yield (
            ("adapters", ROLE),
            f"does nothing without the reward `{USE}`; no other stack takes the adapter of a reward model",
        )
    for index, reward in enumerate(entries(data, "rewards")):
        if given is None and not lent and written(reward, "use") == USE:
            yield (
                ("rewards", index, "use"),
                f"needs a reward model: `adapters: {{{ROLE}: {{path: runs/NAME}}}}`, a run of `algorithm: reward`",
            )
