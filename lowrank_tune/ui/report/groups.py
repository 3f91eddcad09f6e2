"""The parts of the page that are about completions the policy wrote itself: where a step's time went, and groups over
the run."""

from __future__ import annotations

import math

from lowrank_tune.ui.formatting import number, percent, signed
from lowrank_tune.ui.groups import Group, LoggedCompletion
from lowrank_tune.ui.report.charts import bar
from lowrank_tune.ui.report.html import block, table, text
from lowrank_tune.ui.report.run_log import RunLog

PHASES = {
    "rollout": "completions are drawn",
    "reward": "rewards are waited for; most are computed while others are drawn",
    "update": "log-probs, gradients, the optimizer",
}
SHOWN = 3  # groups: the first, one in the middle, the last
MAX_COMPLETIONS = 16  # of a group


def phases(run_log: RunLog) -> str:
    """The share of each phase in the time of all steps."""
    total = sum(run_log.phases.values())
    if not total:
        return ""
    rows = [
        [
            f'{text(name)} <span class="soft">{text(PHASES.get(name, ""))}</span>',
            bar(spent / total),
            percent(spent / total),
            f"{spent:,.1f} s",
        ]
        for name, spent in run_log.phases.items()
    ]
    return (
        f'<h2>Where the time of the steps went</h2><div class="card">{table(["", "share", "", ""], rows, [2, 3])}</div>'
    )


def sampled_groups_html(run_log: RunLog) -> str:
    """A few groups, the first to the last: what was written, and what it earned."""
    groups = [*run_log.completion_groups.values()]
    if run_log.newest is not None and (not groups or groups[-1].step != run_log.newest.step):
        groups.append(run_log.newest)
    if not groups:
        return ""
    indices = sorted({round(at * (len(groups) - 1) / (SHOWN - 1)) for at in range(SHOWN)})
    parts = [_group(groups[index], is_open=index in (0, len(groups) - 1)) for index in indices]
    return (
        f'<h2>Groups over time <span class="soft">the completions of one prompt of a step</span></h2>{"".join(parts)}'
    )


def _group(group: Group, is_open: bool) -> str:
    if group.ground_truth is not None:
        ground_truth = f' <span class="soft">gold {text(group.ground_truth, 80)}</span>'
    else:
        ground_truth = ""
    multiple_rewards = any(len(completion.parts) > 1 for completion in group.completions)
    rows = [
        [
            _figure(completion.reward),
            _advantage(completion.advantage),
            _words(completion, multiple_rewards),
            f"{completion.times} \u00d7",
        ]
        for completion in group.completions[:MAX_COMPLETIONS]
    ]
    left = len(group.completions) - len(rows)
    if left:
        more = f'<p class="soft">{left} other completions are left out</p>'
    else:
        more = ""
    if group.is_zero_std:
        note = ' <span class="soft">no signal: all earn the same</span>'
    else:
        note = ""
    return (
        f"<details{' open' if is_open else ''}><summary>step {group.step:,}: "
        f"{text(group.prompt, 300)}{ground_truth}{note}</summary>"
        f"{table(['reward', 'advantage', 'completion', ''], rows, [0, 1, 3])}{more}</details>"
    )


def _figure(value: float) -> str:
    return number(value) if math.isfinite(value) else "?"


def _advantage(value: float) -> str:
    if not math.isfinite(value):
        return "?"
    return f'<span class="{"yes" if value > 0 else "no" if value < 0 else "zero"}">{signed(value)}</span>'


def _words(completion: LoggedCompletion, multiple_rewards: bool) -> str:
    """The completion, whether it was cut off, and what each of several rewards gave."""
    if completion.finish_reason == "length":
        facts = ["cut off by the limit"]
    else:
        facts = []
    facts += [f"{text(name, 60)} {_figure(value)}" for name, value in completion.parts] if multiple_rewards else []
    facts += [f"not scored: {text(completion.unscored, 300)}"] if completion.unscored else []
    return f'<div class="text">{block(completion.text, 1500)}</div>' + (
        f'<span class="soft">{", ".join(facts)}</span>' if facts else ""
    )
