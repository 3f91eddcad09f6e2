"""Panes that fill the screen and scroll: the whole log, and all answers. The oldest line is at the top."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from lowrank_tune.events import SampleLogged
from lowrank_tune.ui.formatting import number, signed
from lowrank_tune.ui.metrics import PAIR_SIDES
from lowrank_tune.ui.state import LOG_LINES, MAX_SAMPLES, LogLine, State
from lowrank_tune.ui.terminal.log_pane import log_entry
from lowrank_tune.ui.terminal.panes import View, heading, labeled
from lowrank_tune.ui.terminal.text_layout import Block, Line, width_of, wrap

MAX_ENTRY_ROWS = 60
"""Lines of a single message, prompt or answer."""
LABEL_WIDTH = 11

Rows = Callable[[State, View, int], Block]
"""All lines of a pane at a width, the oldest first."""


def log_rows(
    state: State,
    view: View,
    width: int,
) -> Block:
    """Returns all kept lines of the log."""
    rows: Block = []
    for entry in state.log:
        if view.frozen is None or entry.at <= view.frozen:
            rows += _entry_rows(entry, view.ascii_only, width)
    return rows


@lru_cache(maxsize=LOG_LINES)
def _entry_rows(
    entry: LogLine,
    ascii_only: bool,
    width: int,
) -> Block:
    return log_entry(
        entry,
        View(ascii_only=ascii_only),
        width,
        MAX_ENTRY_ROWS,
    )


def answer_rows(
    state: State,
    view: View,
    width: int,
) -> Block:
    """Returns all kept answers, those after the same step under a common line."""
    rows: Block = []
    step: int | None = None
    prompt = ""
    for sample in state.samples:
        if view.frozen is not None and sample.time > view.frozen:
            break
        if sample.step != step:
            step = sample.step
            prompt = ""
            rows += [[], [(f" after step {step}", "title")]]
        if sample.prompt != prompt:
            prompt = sample.prompt
            rows += _prompt_rows(prompt, view.ascii_only, width)
        rows += _sample_rows(sample, view.ascii_only, width)
    return rows[1:]


@lru_cache(maxsize=MAX_SAMPLES)
def _prompt_rows(
    prompt: str,
    ascii_only: bool,
    width: int,
) -> Block:
    rows = _broken(prompt, ascii_only, width - 2)
    return [[(f" {row}", "strong")] for row in rows]


@lru_cache(maxsize=MAX_SAMPLES)
def _sample_rows(
    sample: SampleLogged,
    ascii_only: bool,
    width: int,
) -> Block:
    """Returns an answer with its line breaks, and in brackets what else is known of it."""
    view = View(ascii_only=ascii_only)
    label = f"   {view.sanitize(sample.role, LABEL_WIDTH - 1):<{LABEL_WIDTH}}"
    style = PAIR_SIDES.get(sample.role, "")
    rows = _broken(sample.completion, ascii_only, width - len(label) - 1) or ["(empty)"]
    lines = labeled((label, style or "quiet"), rows)
    facts = ", ".join(_facts(sample, view))
    if not facts:
        return lines
    note: Line = [(f"  [{facts}]", "quiet")]
    if width_of(lines[-1]) + width_of(note) > width:
        lines.append([(" " * (len(label) - 2), "")])
    lines[-1] += note
    return lines


def _facts(sample: SampleLogged, view: View) -> Iterator[str]:
    if sample.role in PAIR_SIDES:
        if sample.reward is not None:
            yield f"score {signed(sample.reward)}"
        return
    if sample.finish_reason != "stop":
        yield "cut off"
    if sample.ground_truth is not None:
        yield f"gold {view.sanitize(sample.ground_truth, 24)}"
    if sample.reward is not None:
        yield f"reward {number(sample.reward)}"


def _broken(
    text: str,
    ascii_only: bool,
    width: int,
) -> list[str]:
    """Returns a text in lines of a width, broken also where the text has a line break."""
    view = View(ascii_only=ascii_only)
    rows = list[str]()
    for line in text.strip().split("\n")[:MAX_ENTRY_ROWS]:
        rows += wrap(view.sanitize(line, MAX_ENTRY_ROWS * width), width, MAX_ENTRY_ROWS - len(rows)) or [""]
    return rows[:MAX_ENTRY_ROWS]


SCROLLED: dict[str, Rows] = {"l": log_rows, "a": answer_rows}


def log_screen(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the whole log."""
    rows = log_rows(state, view, width)
    note = ""
    if state.log_count > len(state.log):
        note = f"the newest {len(state.log):,} of {state.log_count:,} messages, "
    return _scroll_pane(
        "log",
        rows,
        note,
        view,
        width,
        height,
    )


def answers_screen(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns all answers."""
    rows = answer_rows(state, view, width)
    if not rows:
        return [heading("answers", width, view), [(" no answers yet", "quiet")]]
    note = ""
    if state.sample_count > len(state.samples):
        note = f"the newest {len(state.samples):,} of {state.sample_count:,} answers, "
    return _scroll_pane(
        "answers",
        rows,
        note,
        view,
        width,
        height,
    )


def _scroll_pane(
    title: str,
    rows: Block,
    note: str,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns a title with the position, and the lines of that position."""
    room = height - 1
    last = max(min(room, len(rows)), len(rows) - view.scroll)
    first = max(0, last - room)
    position = f"{note}lines {first + 1:,}-{last:,} of {len(rows):,}" if rows else "no lines yet"
    if view.scroll:
        position += ", End: the newest"
    return [heading(title, width, view, position), *rows[first:last]]


def scroll_limit(
    state: State,
    view: View,
    width: int,
    height: int,
) -> int:
    """Returns how many lines the open pane can be scrolled to its first line."""
    if view.pane not in SCROLLED:
        return 0
    rows = SCROLLED[view.pane](state, view, width)
    return max(0, len(rows) - (height - 1))
