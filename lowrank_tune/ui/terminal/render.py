"""The dashboard as a pure function: `render(state, view, width, height)` returns the lines of the screen."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.ui.diagnostics import diagnose
from lowrank_tune.ui.formatting import clock, ended_time, rate, short_label, stage_of, wall_time
from lowrank_tune.ui.metrics import SIDE_TITLES, WITHOUT_REFERENCE
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.chart_pane import chart_names, chart_pane, format_value
from lowrank_tune.ui.terminal.charts import grid_size
from lowrank_tune.ui.terminal.group_pane import group_pane
from lowrank_tune.ui.terminal.help_pane import help_pane
from lowrank_tune.ui.terminal.log_pane import log_pane
from lowrank_tune.ui.terminal.panes import KEYS, OPTIONAL_KEYS, View, keys_of, labeled, labeled_value
from lowrank_tune.ui.terminal.sample_pane import sample_pane
from lowrank_tune.ui.terminal.scroll_panes import SCROLLED, answers_screen, log_screen
from lowrank_tune.ui.terminal.system_line import system_line
from lowrank_tune.ui.terminal.text_layout import (
    Block,
    Line,
    Piece,
    column_widths,
    fit,
    pad,
    shorten,
    side_by_side,
    width_of,
    wrap,
)

MIN_WIDTH = 60
MIN_HEIGHT = 15
"""Columns and lines below which there are no panes."""
MIN_TWO_PANE_WIDTH = 100
"""Columns from which on log and answers are beside each other."""
MIN_TWO_PANE_HEIGHT = 7
"""Lines from which on a narrow screen has both answers and log."""
MAX_PANES_HEIGHT = 18
MIN_PANES_HEIGHT = 4
MAX_SMALL_METRICS = 4
MEMORY_WARNING = 0.92
"""Share of the GPU's memory."""
MIN_PHASE_SHARE = 0.01
UP_DOWN = "\u2191\u2193"
HEAD_LINES = 4
MIN_SYSTEM_HEIGHT = 30
"""Lines from which on the load has a line of its own; below, it replaces that of the roles."""
FOOT_LINES = 1
PANES = {
    "g": group_pane,
    "l": log_screen,
    "a": answers_screen,
}
"""The panes that fill the screen below the header, each with the key that opens and closes it."""
STALE_SECONDS = 60.0
"""Seconds without an event after which the header shows the time since the last one."""
DIAGNOSIS_SIGNS = {
    "bad": "!!",
    "warning": "! ",
    "good": "ok",
    "": "  ",
}


def shown_state(state: State, view: View) -> State:
    """Returns the state of the stage that the view selects, with the current one if there is no such stage."""
    if 0 < view.stage <= len(state.finished_stages):
        return state.finished_stages[view.stage - 1]
    return state


def body_height(view: View, height: int) -> int:
    """Returns the lines between header and footer."""
    lines = height - HEAD_LINES - FOOT_LINES
    return lines - 1 if view.system and height >= MIN_SYSTEM_HEIGHT else lines


def render(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns exactly `height` lines of `width` cells."""
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        return pad(_small_screen(state, view, width), width, height)
    shown = shown_state(state, view)
    head = [
        _title(state, view, width),
        _roles(shown, view, width),
        _progress(shown, view, width),
        _resources(shown, view, width),
    ]
    if view.system and height < MIN_SYSTEM_HEIGHT:
        # the roles do not change, and a small screen needs its lines for the log
        head[1] = system_line(view.system, view, width)
    elif view.system:
        head.append(system_line(view.system, view, width))
    pane = PANES.get(view.pane, _body)
    if view.help:
        pane = help_pane
    rest = body_height(view, height)
    # the help lists the keys of the whole chain
    body = pane(state if view.help else shown, view, width, rest)
    keys = fit(footer(state, view, width), width)
    return [
        *pad(head, width, len(head)),
        *pad(body, width, rest),
        keys,
    ]


def status(state: State, view: View) -> Piece:
    """Returns the status of the run in a few words, and the style of these words."""
    if state.ended is not None:
        return _end_status(state, view)
    silent = 0.0
    if view.now is not None and state.last_time:
        silent = view.now - state.last_time
    if state.ended_process is not None:
        return f"process {state.ended_process} has ended, no news for {clock(silent)}", "bad"
    if view.pending:
        return ", ".join(view.pending), "warning"
    if silent > STALE_SECONDS:
        return f"no news for {clock(silent)}", "warning"
    if state.loading:
        is_known = state.job is not None or state.started is not None
        return "loading" if is_known else "starting", "title"
    if state.job is not None or state.step == 0:
        return "evaluating", "title"
    return "running", "good"


def _end_status(state: State, view: View) -> Piece:
    assert state.ended is not None
    index, count = stage_of(state.ended, state.started)
    text = f"{view.sanitize(state.ended.status)} in {ended_time(state.ended)}"
    if count > 1:
        text = f"stage {index} {text}"
    return text, "good" if state.ended.status == "done" else "bad"


def _title(
    state: State,
    view: View,
    width: int,
) -> Line:
    """Returns name and status of the run, and as much else of it as there is room for."""
    shown = shown_state(state, view)
    status_text, status_style = status(shown, view)
    if shown is not state:
        sign = view.symbol(" \u00b7 ", " - ")
        status_text = f"{status_text}{sign}] to stage {len(state.finished_stages) + 1}"
    status_text = f"  {status_text} "
    room = width - len(status_text)
    badge: Line = [(" lowrank-tune ", "key")]
    details = _details(shown, view)
    line: Line = []
    while True:
        line = [*badge, (" ", ""), *details]
        if width_of(line) <= room or len(details) < 2:
            break
        # the last detail is the least important one
        details.pop()
    return [*fit(line, room), (status_text, status_style)]


def _details(state: State, view: View) -> Line:
    """Returns name, stage, algorithm, model and device of the run, the most important first."""
    run = state.started
    if run is None:
        return []
    separator = view.symbol(" \u00b7 ", " - ")
    job = view.sanitize(run.algorithm)
    if run.stages > 1:
        job = f"stage {run.stage} of {run.stages}: {job}"
    line: Line = [
        (view.sanitize(run.name, 40) or "run", "strong"),
        (f"{separator}{job}", ""),
        (f" of {view.sanitize(run.model, 60)}", ""),
    ]
    if run.device:
        line.append((f"{separator}{view.sanitize(run.device, 60)}", "quiet"))
    return line


def _roles(
    state: State,
    view: View,
    width: int,
) -> Line:
    """Returns each role with its stack of adapters, and the description of the reference; on a narrow screen its
    stack."""
    run = state.started
    if run is None:
        return [(" preparing data and base", "quiet")]
    line: Line = []
    for role, adapters in run.roles.items():
        if role != "reference":
            line += labeled_value(f" {view.sanitize(role)} ", f"= {view.sanitize(_stack(adapters))}  ")
    if run.algorithm in WITHOUT_REFERENCE:
        return line
    label = " reference "
    room = width - width_of(line) - len(label)
    reference = f"= {view.sanitize(run.reference)}"
    if len(reference) > room:
        reference = f"= {view.sanitize(_stack(run.roles.get('reference', [])))}"
    return line + labeled_value(label, shorten(reference, room))


def _stack(adapters: Sequence[str]) -> str:
    return " + ".join(("base", *adapters))


def _bar(
    share: float,
    width: int,
    view: View,
) -> Line:
    full = round(min(1.0, max(0.0, share)) * width)
    done = view.symbol("\u2501", "#")
    rest = view.symbol("\u2500", ".")
    return [(done * full, "bar"), (rest * (width - full), "quiet")]


def _progress(
    state: State,
    view: View,
    width: int,
) -> Line:
    """Returns the bar of the current job, or of the whole run, with its figures."""
    facts = _progress_facts(state, view)
    totals = state.totals
    if state.start_time is not None and state.ended is None:
        facts.append(f"for {wall_time(totals.seconds, totals.sessions)}")
    if totals.tokens:
        facts.append(f"{rate(totals.tokens_per_second)} tokens/s")
    # a narrow screen keeps the first facts
    while len(facts) > 1 and sum(len(fact) + 2 for fact in facts) > width - 12:
        facts.pop()
    text = f"  {'  '.join(facts)} "
    bar = _bar(_share_done(state), max(8, width - len(text) - 1), view)
    return [(" ", ""), *bar, (text, "")]


def _progress_facts(state: State, view: View) -> list[str]:
    facts = list[str]()
    job = state.job
    if job is not None:
        facts.append(f"{view.sanitize(job.description, 44)} {job.done:,}/{job.total:,}")
    if state.started is not None and (job is None or state.step):
        percentage = 100 * state.step / max(1, state.steps)
        facts.append(f"step {state.step}/{state.steps} ({percentage:.0f} %)")
    is_stopped = state.ended_process is not None
    if job is None and state.seconds_left is not None and state.step < state.steps and not is_stopped:
        facts.append(f"ETA {clock(state.seconds_left)}")
    return facts


def _share_done(state: State) -> float:
    if state.job is None:
        return state.step / max(1, state.steps)
    return state.job.done / state.job.total if state.job.total else 0.0


def _resources(
    state: State,
    view: View,
    width: int,
) -> Line:
    """Returns the memory of the GPU, and the shares of the phases in the time of the steps and of the run."""
    line = _memory(state, view)
    step_shares = [f"{name} {share:.0%}" for name, share in state.step_phase_shares().items()]
    if step_shares:
        line += labeled_value("   step ", "  ".join(step_shares))
    shares = []
    for name, share in state.phase_shares().items():
        if share >= MIN_PHASE_SHARE:
            shares.append(f"{name} {share:.0%}")
    label = "   time "
    # a narrow screen keeps the largest shares
    room = width - width_of(line) - len(label)
    while shares and len("  ".join(shares)) > room:
        shares.pop()
    if shares:
        line += labeled_value(label, "  ".join(shares))
    return line


def _memory(state: State, view: View) -> Line:
    used = state.last("memory_gib")
    if used is None:
        return []
    total = 0.0
    if state.started is not None:
        total = state.started.memory_total_gib
    if not total:
        return labeled_value(" memory ", f"{used:.1f} GiB")
    style = "warning" if used > MEMORY_WARNING * total else ""
    return [
        (" memory ", "quiet"),
        *_bar(used / total, 8, view),
        (f" {used:.1f} of {total:.1f} GiB", style),
    ]


def _body(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the charts, below them the diagnoses, then log and answers."""
    diagnoses = _diagnoses(
        state,
        view,
        width,
        max(1, height // 9),
    )
    height -= len(diagnoses)
    grid: Block = []
    charts = chart_names(state)
    if charts:
        panes_height = max(MIN_PANES_HEIGHT, min(MAX_PANES_HEIGHT, height * 2 // 5))
        grid = _chart_grid(
            state,
            charts,
            view,
            width,
            height - panes_height,
        )
    return [
        *grid,
        *diagnoses,
        *_log_and_samples(
            state,
            view,
            width,
            height - len(grid),
        ),
    ]


def _chart_grid(
    state: State,
    charts: Sequence[Sequence[str]],
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns rows of charts, and a line with the last values of the charts that do not fit."""
    columns, rows = grid_size(len(charts), width, height)
    shown = charts[: columns * rows]
    left_out = charts[columns * rows :]
    if left_out:
        height -= 1
    widths = column_widths(width, columns)
    lines: Block = []
    for start in range(0, len(shown), columns):
        lines += _chart_row(
            state,
            shown[start : start + columns],
            view,
            widths,
            height // rows,
        )
    if left_out:
        lines.append(
            _last_values(
                state,
                left_out,
                view,
                width,
            )
        )
    return lines


def _chart_row(
    state: State,
    charts: Sequence[Sequence[str]],
    view: View,
    widths: Sequence[int],
    height: int,
) -> Block:
    blocks = []
    for names, width in zip(charts, widths, strict=False):
        blocks.append(
            chart_pane(
                state,
                names,
                view,
                width,
                height,
            )
        )
    return side_by_side(blocks, widths[: len(blocks)], height)


def _last_values(
    state: State,
    charts: Sequence[Sequence[str]],
    view: View,
    width: int,
) -> Line:
    """Returns a line with the last values of charts that a small screen does not show. Charts of several metrics are
    last, because a chart whose values do not fit is left out."""
    line: Line = [(" ", "")]
    for names in sorted(charts, key=len):
        values = _values_of_chart(state, names, view)
        if width_of(line) + width_of(values) <= width + 2:
            line += values
    return line


def _values_of_chart(
    state: State,
    names: Sequence[str],
    view: View,
) -> Line:
    values: Line = []
    if len(names) > 1:
        values.append((f"{SIDE_TITLES.get(names[0], 'rewards:')} ", "quiet"))
    for name in names:
        last = state.last(name)
        if last is None:
            continue
        label = view.sanitize(short_label(name), 20)
        values += labeled_value(f"{label} ", f"{format_value(name, last)}   ")
    return values


def _diagnoses(
    state: State,
    view: View,
    width: int,
    max_lines: int,
) -> Block:
    lines: Block = []
    for diagnosis in diagnose(state):
        rows = wrap(view.sanitize(diagnosis.text), width - 5, 2)
        label = f" {DIAGNOSIS_SIGNS[diagnosis.level]} "
        lines += labeled((label, diagnosis.level), rows, diagnosis.level)
    return lines[:max_lines]


def _log_and_samples(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the log and the answers: side by side, or the answers above the log on a narrow screen.

    Nothing is at the right of the answers, because a terminal may measure a character of theirs in another way.
    """
    if width >= MIN_TWO_PANE_WIDTH:
        left = (width - 1) * 9 // 20
        right = width - 1 - left
        panes = [
            log_pane(
                state,
                view,
                left,
                height,
            ),
            sample_pane(state, view, right, height),
        ]
        return side_by_side(panes, [left, right], height)
    samples_height = 2
    if state.answers or state.earlier or state.pairs:
        if height < MIN_TWO_PANE_HEIGHT:
            # the diagnoses also contain the most important warnings
            return sample_pane(state, view, width, height)
        samples_height = height * 3 // 5
    samples = pad(
        sample_pane(
            state,
            view,
            width,
            samples_height,
        ),
        width,
        samples_height,
    )
    return [
        *samples,
        *log_pane(
            state,
            view,
            width,
            height - samples_height,
        ),
    ]


def footer(
    state: State,
    view: View,
    width: int,
) -> Line:
    """Returns the keys with their labels. A narrow screen leaves out some of them."""
    if not view.keys:
        return [(" no keyboard input: Ctrl-C saves and quits", "quiet")]
    keys = keys_of(state, view)
    for left_out in (*OPTIONAL_KEYS, ""):
        for is_wide in (True, False):
            line = _key_line(keys, view, is_wide)
            if width_of(line) <= width:
                return line
        keys = [key for key in keys if key != left_out]
    return line


def _key_line(
    keys: Sequence[str],
    view: View,
    is_wide: bool,
) -> Line:
    line: Line = [(" ", "")]
    for key in keys:
        label, _ = KEYS[key]
        if label:
            label = f" {label} "
        if is_wide:
            key = f" {key} "
            label = f"{label} " if label else ""
        line += [(key, "key"), (label, "")]
    if view.pane in SCROLLED:
        line.append((f"{view.symbol(UP_DOWN, 'Up Down')} PgUp PgDn Home End", "quiet"))
    return line


def _small_screen(
    state: State,
    view: View,
    width: int,
) -> Block:
    """Returns plain lines for a screen that has no room for panes."""
    run = state.started
    status_text, status_style = status(state, view)
    name = view.sanitize(run.name) if run else "starting"
    rows = [(f"{name}: {status_text}", status_style)]
    job = state.job
    if job is not None:
        rows.append((f"{view.sanitize(job.description)} {job.done}/{job.total}", ""))
    if run is not None:
        steps = f"step {state.step}/{state.steps}"
        if state.seconds_left is not None and state.ended_process is None:
            steps = f"{steps}, ETA {clock(state.seconds_left)}"
        rows.append((steps, ""))
    rows += _small_metrics(state, view)
    for diagnosis in diagnose(state):
        for row in wrap(view.sanitize(diagnosis.text), width, 2):
            rows.append((row, diagnosis.level))
    for entry in reversed(state.warnings):
        rows.append((view.sanitize(entry.text), "warning"))
    return [[row] for row in rows]


def _small_metrics(state: State, view: View) -> list[Piece]:
    """Returns a row for each of the most important metrics that were measured."""
    names = [name for chart in chart_names(state) for name in chart]
    names = [name for name in [*names, "eval_loss"] if name in state.series]
    rows = []
    for name in names[:MAX_SMALL_METRICS]:
        label = view.sanitize(short_label(name), 40)
        rows.append((f"{label} {format_value(name, state.series[name].last)}", ""))
    return rows
