"""The group pane: the completions of the policy for one prompt, highest reward first, with their rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lowrank_tune.ui.formatting import number, plural, signed
from lowrank_tune.ui.groups import Group, LoggedCompletion
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import View, heading, labeled, prompt_lines
from lowrank_tune.ui.terminal.text_layout import Block, wrap

LABEL = " {:>8} {:>9}  {:<6} {:<4} "
"""Columns for reward, advantage, end, and how often the completion was sampled."""
INDENT = len(LABEL.format("", "", "", ""))
FIGURE_WIDTH = 9
MAX_ROWS = 8
"""Lines of one completion."""


def group_pane(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the newest group. Completions that do not fit are on further pages."""
    group = state.group
    if group is None:
        note = " no completions yet: they come with the first step of an algorithm that has rewards"
        return [heading("group", width, view), [(note, "quiet")]]
    head = _prompt(
        group,
        view,
        width,
        max(1, min(3, height // 6)),
    )
    head.append(
        [
            (
                LABEL.format(
                    "reward",
                    "advantage",
                    "end",
                    "",
                ),
                "quiet",
            ),
            ("completion", "quiet"),
        ]
    )
    pages = _pages(
        group.completions,
        view,
        width,
        max(1, height - len(head) - 2),
    )
    page = view.sample % len(pages)
    note = ""
    if len(pages) > 1:
        note = f"page {page + 1} of {len(pages)}, n: next page"
    elif group.is_zero_std:
        note = "no signal: all rewards are equal"
    lines = [
        heading(
            f"group of step {group.step}: {plural(group.count, 'completion')}",
            width,
            view,
            note,
        ),
        *head,
    ]
    for block in pages[page]:
        lines += block
    return [*lines[: height - 1], [(f" {_reward_summary(group)}", "quiet")]]


def _prompt(
    group: Group,
    view: View,
    width: int,
    max_lines: int,
) -> Block:
    """Returns the prompt with its solution behind the last line."""
    lines = prompt_lines(
        group.prompt,
        view,
        width,
        max_lines,
    )
    if lines and group.ground_truth is not None:
        lines[-1].append((f"  [gold {view.sanitize(group.ground_truth, 24)}]", "quiet"))
    return lines


def _pages(
    completions: Sequence[LoggedCompletion],
    view: View,
    width: int,
    room: int,
) -> list[list[Block]]:
    """Distributes the completions over as few pages as possible. Each completion may fill an equal share of a page."""
    max_lines = max(2, min(MAX_ROWS, room // max(1, len(completions))))
    pages: list[list[Block]] = [[]]
    left = room
    for completion in completions:
        block = _block(
            completion,
            view,
            width,
            min(max_lines, room),
        )
        if len(block) > left and pages[-1]:
            pages.append([])
            left = room
        pages[-1].append(block)
        left -= len(block)
    return pages


def _block(
    completion: LoggedCompletion,
    view: View,
    width: int,
    max_lines: int,
) -> Block:
    """Returns the figures and the text of a completion, and below it the parts of its reward if it has several."""
    parts = _reward_parts(completion, view, width)
    text = view.sanitize(completion.text, max_lines * width)
    text_lines = max_lines
    if parts:
        text_lines = max(1, max_lines - 1)
    rows = wrap(text, width - INDENT - 1, text_lines) or ["(empty)"]
    label = _block_label(completion, view)
    lines = labeled((label, _sign_style(completion.advantage)), rows)
    if parts and len(lines) < max_lines:
        lines.append([(" " * INDENT, ""), (parts, "quiet")])
    return lines


def _block_label(completion: LoggedCompletion, view: View) -> str:
    reward = _figure(number, completion.reward)
    advantage = _figure(signed, completion.advantage)
    end = "cut"
    if completion.finish_reason != "length":
        end = view.sanitize(completion.finish_reason, 6)
    times = f"x{completion.times}" if completion.times > 1 else ""
    return LABEL.format(reward, advantage, end, times)


def _sign_style(advantage: float) -> str:
    if advantage > 0:
        return "chosen"
    if advantage < 0:
        return "rejected"
    return "quiet"


def _reward_parts(
    completion: LoggedCompletion,
    view: View,
    width: int,
) -> str:
    """Returns each of several rewards, or why the completion was not scored; an empty string for a single reward."""
    if completion.unscored:
        return f"not scored: {view.sanitize(completion.unscored, width)}"
    if len(completion.parts) < 2:
        return ""
    parts = []
    for name, value in completion.parts:
        parts.append(f"{view.sanitize(name, 20)} {_figure(number, value)}")
    return "  ".join(parts)


def _figure(write: Callable[[float], str], value: float) -> str:
    return write(value)[:FIGURE_WIDTH] if math.isfinite(value) else "?"


def _reward_summary(group: Group) -> str:
    """Returns mean and range of the rewards, and how many completions were cut off, and the keys to leave."""
    rewards = list[float]()
    cut = 0
    for completion in group.completions:
        if math.isfinite(completion.reward):
            rewards += [completion.reward] * completion.times
        if completion.finish_reason == "length":
            cut += completion.times
    if not rewards:
        return "no reward is known"
    mean = number(sum(rewards) / len(rewards))
    return (
        f"mean reward {mean}, from {number(min(rewards))} to {number(max(rewards))}; "
        f"{cut} of {group.count} cut off; g or Esc leaves"
    )
