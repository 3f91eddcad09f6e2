"""Completions of the policy: where the time of the steps went, and a few groups over the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lowrank_tune.ui.formatting import number, signed
from lowrank_tune.ui.groups import Group, LoggedCompletion
from lowrank_tune.ui.html import render, text
from lowrank_tune.ui.report.run_log import RunLog

PHASE_DESCRIPTIONS = {
    "rollout": "drawing completions",
    "reward": "waiting for rewards; most are computed while completions are drawn",
    "update": "log-probs, gradients, the optimizer",
}
SHOWN_GROUPS = 3
"""The first group, one in the middle, the last."""
MAX_COMPLETIONS = 16
"""Completions of a group."""


@dataclass(frozen=True)
class CompletionRow:
    """A completion as it is shown. `sign` is the style of the advantage, empty if it is not a number."""

    completion: LoggedCompletion
    reward: str
    advantage: str
    sign: str
    notes: Sequence[str]


@dataclass(frozen=True)
class GroupCard:
    """A group with the completions that are shown."""

    group: Group
    is_open: bool
    rows: Sequence[CompletionRow]

    @property
    def left_out(self) -> int:
        return len(self.group.completions) - len(self.rows)


def phases(run_log: RunLog) -> Markup:
    """Returns the share of each phase in the time of all steps, empty for an algorithm without phases."""
    total = sum(run_log.phases.values())
    if not total:
        return Markup()
    return render(
        "phases",
        phases=run_log.phases,
        total=total,
        descriptions=PHASE_DESCRIPTIONS,
    )


def sampled_groups(run_log: RunLog) -> Markup:
    """Returns a few groups from the first to the last: completions and their rewards. Empty if the run has none."""
    groups = list(run_log.completion_groups.values())
    if run_log.newest is not None and (not groups or groups[-1].step != run_log.newest.step):
        groups.append(run_log.newest)
    if not groups:
        return Markup()
    last = len(groups) - 1
    indices = sorted({round(at * last / (SHOWN_GROUPS - 1)) for at in range(SHOWN_GROUPS)})
    return render(
        "groups",
        cards=[_card(groups[index], index in (0, last)) for index in indices],
    )


def _card(group: Group, is_open: bool) -> GroupCard:
    has_several_rewards = any(len(completion.parts) > 1 for completion in group.completions)
    rows = []
    for completion in group.completions[:MAX_COMPLETIONS]:
        notes = list(_notes(completion, has_several_rewards))
        advantage, sign = _advantage(completion.advantage)
        rows.append(
            CompletionRow(
                completion,
                _number(completion.reward),
                advantage,
                sign,
                notes,
            )
        )
    return GroupCard(group, is_open, rows)


def _notes(completion: LoggedCompletion, has_several_rewards: bool) -> Iterator[str]:
    """Yields whether a completion was cut off, each of several rewards, and which reward failed on it."""
    if completion.finish_reason == "length":
        yield "cut off by the limit"
    if has_several_rewards:
        for name, value in completion.parts:
            yield f"{text(name, 60)} {_number(value)}"
    if completion.unscored:
        yield f"not scored: {text(completion.unscored, 300)}"


def _advantage(value: float) -> tuple[str, str]:
    if not math.isfinite(value):
        return "?", ""
    if value == 0:
        return signed(value), "zero"
    return signed(value), "yes" if value > 0 else "no"


def _number(value: float) -> str:
    return number(value) if math.isfinite(value) else "?"
