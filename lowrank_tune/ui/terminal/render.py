"""The dashboard as a pure function: `render(state, view, width, height)` is the screen, line by line."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.ui.diagnostics import diagnose
from lowrank_tune.ui.formatting import METRIC_FORMATS, clock, stage_of
from lowrank_tune.ui.metrics import SIDE_TITLES, WITHOUT_REFERENCE, reward_label
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.group_pane import group_pane
from lowrank_tune.ui.terminal.panes import (
    View,
    chart_names,
    chart_pane,
    format_value,
    help_pane,
    keys_of,
    log_pane,
    sample_pane,
)
from lowrank_tune.ui.terminal.text_layout import Line, fit, pad, sanitize, side_by_side, width_of, wrap

MIN_WIDTH = 60
MIN_HEIGHT = 15
CHART_WIDTH = 36
CHART_HEIGHT = 9
MAX_COLUMNS = 3
SIDE_BY_SIDE = 100  # from here on log and answers stand next to each other
KEY_LABELS = {
    "q": "quit",
    "p": "pause",
    "s": "save",
    "e": "eval",
    "n": "next",
    "g": "group",
    "l": "log",
    "+": "",
    "-": "smooth",
    "?": "help",
}
STALE_SECONDS = 60.0  # seconds without an event, after which the header says so


def render(state: State, view: View, width: int, height: int) -> list[Line]:
    """Exactly `height` lines of `width` cells."""
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        return pad(_small(state, view, width), width, height)
    head = [
        _title(state, view, width),
        _roles(state, view),
        _progress(state, view, width),
        _resources(state, view, width),
    ]
    body_height = height - len(head) - 1
    if view.help:
        pane = help_pane
    elif view.group:
        pane = group_pane
    else:
        pane = _body
    body = pane(state, view, width, body_height)
    return [*pad(head, width, len(head)), *pad(body, width, body_height), fit(_footer(state, view, width), width)]


def render_several(states: Sequence[State], view: View, width: int, height: int) -> list[Line]:
    """Several runs: side by side where the screen is wide enough, else one above the other."""
    if len(states) == 1:
        return render(states[0], view, width, height)
    count = len(states)
    edge = "|" if view.ascii_only else "\u2502"
    pane_width = (width - count + 1) // count
    if pane_width >= MIN_WIDTH:
        widths = [pane_width] * (count - 1) + [width - count + 1 - pane_width * (count - 1)]
        return side_by_side(
            [render(state, view, column_width, height) for state, column_width in zip(states, widths, strict=True)],
            widths,
            height,
            edge,
        )
    lines: list[Line] = []
    for index, state in enumerate(states):
        lines += render(state, view, width, (height - len(lines)) // (count - index))
    return lines


def status(state: State, view: View) -> tuple[str, str]:
    """How the run stands, in a word or a few, and the style of that."""
    if state.ended is not None:
        index, count = stage_of(state.ended, state.started)
        stage = f"stage {index} " if count > 1 else ""
        return (
            f"{stage}{sanitize(state.ended.status)} in {clock(state.ended.seconds)}",
            "good" if state.ended.status == "done" else "bad",
        )
    if view.now is not None and state.last_time:
        silent = view.now - state.last_time
    else:
        silent = 0.0
    if state.ended_process is not None:
        return f"process {state.ended_process} has ended, no news for {clock(silent)}", "bad"
    if view.pending:
        return ", ".join(view.pending), "warning"
    if silent > STALE_SECONDS:
        return f"no news for {clock(silent)}", "warning"
    if state.loading:
        if state.job is not None or state.started is not None:
            return ("loading", "title")
        return ("starting", "title")
    if state.job is not None or state.step == 0:
        return ("evaluating", "title")
    return ("running", "good")


def _title(state: State, view: View, width: int) -> Line:
    run = state.started
    dot = " - " if view.ascii_only else " \u00b7 "
    line: Line = [(" lowrank-tune ", "key"), (" ", "")]
    if run is not None:
        if run.stages > 1:
            stages = f"{dot}stage {run.stage} of {run.stages}: "
        else:
            stages = dot
        name, model, device = (sanitize(text, view.ascii_only, 60) for text in (run.name, run.model, run.device))
        line += [(name or "run", "strong"), (f"{stages}{sanitize(run.algorithm, view.ascii_only)} of {model}", "")]
        line += [(f"{dot}{device}", "quiet")] if device else []
    status_text, style = status(state, view)
    status_text = f"  {status_text} "
    return [*fit(line, width - len(status_text)), (status_text, style)]


def _roles(state: State, view: View) -> Line:
    """Each role as the stack it is, and the reference in words."""
    if state.started is None:
        return [(" preparing data and base", "quiet")]
    line: Line = []
    for role, stack in state.started.roles.items():
        if role != "reference":
            line += [
                (f" {sanitize(role, view.ascii_only)} ", "quiet"),
                (f"= {sanitize(' + '.join(('base', *stack)), view.ascii_only)}  ", ""),
            ]
    if state.started.algorithm in WITHOUT_REFERENCE:
        return line
    return [*line, (" reference ", "quiet"), (f"= {sanitize(state.started.reference, view.ascii_only)}", "")]


def _bar(share: float, width: int, view: View) -> Line:
    full = round(min(1.0, max(0.0, share)) * width)
    drawn, rest = ("#", ".") if view.ascii_only else ("\u2501", "\u2500")
    return [(drawn * full, "bar"), (rest * (width - full), "quiet")]


def _progress(state: State, view: View, width: int) -> Line:
    """The bar of the run, or of a long job before and between its steps."""
    if state.started:
        facts = [f"step {state.step}/{state.steps} ({100 * state.step / max(1, state.steps):.0f} %)"]
    else:
        facts = []
    share = state.step / max(1, state.steps)
    if state.job is not None:
        share = state.job.done / state.job.total if state.job.total else 0.0
        facts = [
            f"{sanitize(state.job.description, view.ascii_only, 44)} {state.job.done:,}/{state.job.total:,}",
            *(facts if state.step else []),
        ]
    elif state.seconds_left is not None and state.step < state.steps and state.ended_process is None:
        facts.append(f"ETA {clock(state.seconds_left)}")
    if state.start_time is not None and state.ended is None:
        facts.append(f"for {clock(state.last_time - state.start_time)}")
    if (speed := state.tokens_per_second) is not None:
        facts.append(f"{speed:,.0f} tokens/s")
    while len(facts) > 1 and sum(len(fact) + 2 for fact in facts) > width - 12:
        facts.pop()  # a narrow screen keeps the first ones
    text = "  " + "  ".join(facts) + " "
    return [(" ", ""), *_bar(share, max(8, width - len(text) - 1), view), (text, "")]


def _resources(state: State, view: View, width: int) -> Line:
    """Memory of the GPU, and where the time goes: that of the steps by their phases, and that of the run."""
    line: Line = []
    if (used := state.memory_gib) is not None:
        total = state.started.memory_total_gib if state.started else 0.0
        line += [(" memory ", "quiet")]
        if total:
            style = "warning" if used > 0.92 * total else ""
            line += [*_bar(used / total, 8, view), (f" {used:.1f} of {total:.1f} GiB", style)]
        else:
            line += [(f"{used:.1f} GiB", "")]
    if view.gpu:
        line += [(f"  {sanitize(view.gpu, view.ascii_only)}", "quiet")]
    if within := state.step_phase_shares():
        line += [("   step ", "quiet"), ("  ".join(f"{name} {share:.0%}" for name, share in within.items()), "")]
    shares = [f"{name} {share:.0%}" for name, share in state.phase_shares().items() if share >= 0.01]
    while within and shares and width_of(line) + len("   time ") + len("  ".join(shares)) > width:
        shares.pop()  # a narrow screen keeps the largest ones
    if shares:
        line += [("   time ", "quiet"), ("  ".join(shares), "")]
    return line


def _body(state: State, view: View, width: int, height: int) -> list[Line]:
    """Charts above, the diagnoses, then log and answers."""
    diagnoses = _diagnoses(state, view, width, max(1, height // 9))
    names = chart_names(state)
    rest = height - len(diagnoses)
    columns = max(1, min(MAX_COLUMNS, width // CHART_WIDTH, len(names)))
    if not names:
        return [*diagnoses, *_panes(state, view, width, rest)]
    panes_height = max(4, min(18, rest * 2 // 5))
    rows = max(1, min((rest - panes_height) // CHART_HEIGHT, -(-len(names) // columns)))
    left_out = names[columns * rows :]
    grid = _charts(state, view, names[: columns * rows], columns, width, (rest - panes_height - bool(left_out)) // rows)
    if left_out:
        grid.append(_figures(state, left_out, view, width))
    return [*grid, *diagnoses, *_panes(state, view, width, height - len(grid) - len(diagnoses))]


def _charts(
    state: State,
    view: View,
    names: Sequence[Sequence[str]],
    columns: int,
    width: int,
    height: int,
) -> list[Line]:
    lines: list[Line] = []
    base, extra = divmod(width - columns + 1, columns)
    widths = [base + (index < extra) for index in range(columns)]
    for at in range(0, len(names), columns):
        row = [
            chart_pane(state, chart, view, widths[index], height)
            for index, chart in enumerate(names[at : at + columns])
        ]
        lines += side_by_side([*row, *([[]] * (columns - len(row)))], widths, height)
    return lines


def _figures(state: State, charts: Sequence[Sequence[str]], view: View, width: int) -> Line:
    """In one line what has no chart on a small screen; sides of pairs last, for a figure that does not fit whole is
    left out."""
    line: Line = [(" ", "")]
    for names in sorted(charts, key=len):
        part: Line = [(f"{SIDE_TITLES.get(names[0], 'rewards:')} ", "quiet")] if len(names) > 1 else []
        for name in names:
            if name in METRIC_FORMATS:
                label = METRIC_FORMATS[name][0]
            else:
                label = sanitize(reward_label(name), view.ascii_only, 20)
            last = state.last(name)
            part += [(f"{label} ", "quiet"), (f"{format_value(name, last)}   ", "")] if last is not None else []
        if width_of(line) + width_of(part) <= width + 2:
            line += part
    return line


def _diagnoses(state: State, view: View, width: int, most: int) -> list[Line]:
    signs = {"bad": "!!", "warning": "! ", "good": "ok", "": "  "}
    lines: list[Line] = []
    for diagnosis in diagnose(state):
        for row, part in enumerate(wrap(sanitize(diagnosis.text, view.ascii_only), width - 5, 2)):
            lines.append(
                [(f" {signs[diagnosis.level] if row == 0 else '  '} ", diagnosis.level), (part, diagnosis.level)]
            )
    return lines[: max(1, most)]


def _panes(state: State, view: View, width: int, height: int) -> list[Line]:
    """Answers stand at the right or alone: where a terminal measures a character otherwise than we do, nothing after it
    moves."""
    if width >= SIDE_BY_SIDE:
        left = (width - 1) * 9 // 20
        widths = [left, width - 1 - left]
        return side_by_side(
            [log_pane(state, view, left, height), sample_pane(state, view, widths[1], height)],
            widths,
            height,
        )
    shown = bool(state.answers or state.earlier or state.pairs)
    if shown and height < 7:  # no room for both; what is wrong is also said by the diagnoses
        return sample_pane(state, view, width, height)
    above = height * 3 // 5 if shown else 2
    return [*pad(sample_pane(state, view, width, above), width, above), *log_pane(state, view, width, height - above)]


def _footer(state: State, view: View, width: int) -> Line:
    if not view.keys:
        return [(" no keyboard here: Ctrl-C saves and quits", "quiet")]
    line: Line = [(" ", "")]
    wide = width >= SIDE_BY_SIDE
    for key in keys_of(state, view):
        line += [
            (f" {key} " if wide else key, "key"),
            (f" {KEY_LABELS[key]} " + " " * wide if KEY_LABELS[key] else "", ""),
        ]
    return line


def _small(state: State, view: View, width: int) -> list[Line]:
    """Plain lines for a screen that has no room for panes."""
    run = state.started
    status_text, style = status(state, view)
    lines: list[Line] = [[(f"{sanitize(run.name, view.ascii_only) if run else 'starting'}: {status_text}", style)]]
    if state.job is not None:
        lines.append([(f"{sanitize(state.job.description, view.ascii_only)} {state.job.done}/{state.job.total}", "")])
    if run is not None:
        if state.seconds_left is not None:
            left = f", ETA {clock(state.seconds_left)}"
        else:
            left = ""
        left = "" if state.ended_process is not None else left
        lines.append([(f"step {state.step}/{state.steps}{left}", "")])
    names = [
        name
        for name in (*(name for chart in chart_names(state) for name in chart), "eval_loss")
        if name in state.series
    ]
    for name in names[:4]:
        lines.append(
            [
                (
                    f"{sanitize(name, view.ascii_only, 40).replace('_', ' ')} "
                    f"{format_value(name, state.series[name].last)}",
                    "",
                )
            ]
        )
    lines += [
        [(part, diagnosis.level)]
        for diagnosis in diagnose(state)
        for part in wrap(sanitize(diagnosis.text, view.ascii_only), width, 2)
    ]
    return lines + [[(sanitize(entry.text, view.ascii_only), "warning")] for entry in reversed(state.warnings)]
