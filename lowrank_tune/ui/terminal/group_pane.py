"""The group inspector: what the policy wrote to one prompt, best paid first, and what each completion earned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lowrank_tune.ui.formatting import number, signed
from lowrank_tune.ui.groups import Group, LoggedCompletion
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import View, heading
from lowrank_tune.ui.terminal.text_layout import Line, sanitize, wrap

LABEL = " {:>8} {:>9}  {:<6} {:<4} "
INDENT = len(LABEL.format("", "", "", ""))
MAX_ROWS = 8  # of one completion


def group_pane(state: State, view: View, width: int, height: int) -> list[Line]:
    """The newest group. Completions that find no room stand on further pages."""
    group = state.group
    if group is None:
        note = " no completions yet: they come with the first step of an algorithm that has rewards"
        return [heading("group", width, view), [(note, "quiet")]]
    prompt_lines = wrap(sanitize(group.prompt, view.ascii_only, 3 * width), width - 2, max(1, min(3, height // 6)))
    head: list[Line] = [[(f" {text}", "strong")] for text in prompt_lines]
    if group.ground_truth is not None:
        head[-1:] = (
            [[*head[-1], (f"  [gold {sanitize(group.ground_truth, view.ascii_only, 24)}]", "quiet")]] if head else []
        )
    head.append([(LABEL.format("reward", "advantage", "end", ""), "quiet"), ("completion", "quiet")])
    pages = _pages(group.completions, view, width, max(1, height - len(head) - 2))
    page = view.sample % len(pages)
    if len(pages) > 1:
        note = f"page {page + 1} of {len(pages)}, n turns"
    elif group.is_zero_std:
        note = "no signal: all earn the same"
    else:
        note = ""
    lines = [heading(f"group of step {group.step}: {group.count} completions", width, view, note), *head]
    for block in pages[page]:
        lines += block
    return [*lines[: height - 1], [(" " + _reward_summary(group), "quiet")]]


def _pages(completions: Sequence[LoggedCompletion], view: View, width: int, room: int) -> list[list[list[Line]]]:
    """Completions as blocks of lines, shared out over as few pages as hold them; each may fill what an equal share
    leaves it."""
    max_lines = max(2, min(MAX_ROWS, room // max(1, len(completions))))
    pages: list[list[list[Line]]] = [[]]
    left = room
    for completion in completions:
        block = _block(completion, view, width, min(max_lines, room))
        if len(block) > left and pages[-1]:
            pages.append([])
            left = room
        pages[-1].append(block)
        left -= len(block)
    return pages


def _block(completion: LoggedCompletion, view: View, width: int, max_lines: int) -> list[Line]:
    """A completion: its figures, then its words; where several rewards make one up, each of them."""
    if completion.advantage > 0:
        style = "chosen"
    elif completion.advantage < 0:
        style = "rejected"
    else:
        style = "quiet"
    times = f"x{completion.times}" if completion.times > 1 else ""
    if completion.finish_reason == "length":
        end = "cut"
    else:
        end = sanitize(completion.finish_reason, view.ascii_only, 6)
    label = LABEL.format(_figure(number, completion.reward), _figure(signed, completion.advantage), end, times)
    if len(completion.parts) > 1:
        parts = "  ".join(
            f"{sanitize(name, view.ascii_only, 20)} {_figure(number, value)}" for name, value in completion.parts
        )
    else:
        parts = ""
    if completion.unscored:
        parts = f"not scored: {sanitize(completion.unscored, view.ascii_only, width)}"
    rows = wrap(
        sanitize(completion.text, view.ascii_only, max_lines * width),
        width - INDENT - 1,
        max(1, max_lines - bool(parts)),
    ) or ["(empty)"]
    lines: list[Line] = [[(label if row == 0 else " " * INDENT, style), (part, "")] for row, part in enumerate(rows)]
    if parts and len(lines) < max_lines:
        lines.append([(" " * INDENT, ""), (parts, "quiet")])
    return lines


def _figure(write: Callable[[float], str], value: float) -> str:
    return write(value)[:9] if math.isfinite(value) else "?"


def _reward_summary(group: Group) -> str:
    """What the group as a whole earned."""
    rewards = [
        completion.reward
        for completion in group.completions
        for _ in range(completion.times)
        if math.isfinite(completion.reward)
    ]
    if not rewards:
        return "nothing is known of the rewards"
    mean = sum(rewards) / len(rewards)
    cut = sum(completion.times for completion in group.completions if completion.finish_reason == "length")
    summary = (
        f"mean reward {number(mean)}, from {number(min(rewards))} to {number(max(rewards))}; {cut} of "
        f"{group.count} cut off"
    )
    return f"{summary}; g or Esc leaves"
