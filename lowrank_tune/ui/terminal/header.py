"""The header of the dashboard: title and status, roles, progress, memory and time, and the load."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.ui.formatting import clock, ended_time, rate, stage_of, wall_time
from lowrank_tune.ui.metrics import WITHOUT_REFERENCE
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import View, labeled_value
from lowrank_tune.ui.terminal.system_line import system_line
from lowrank_tune.ui.terminal.text_layout import Block, Line, Piece, fit, shorten, width_of

HEAD_LINES = 4
"""Lines without that of the load."""
MIN_SYSTEM_HEIGHT = 30
"""Lines of the screen from which on the load has a line of its own; below, it replaces that of the roles."""
MEMORY_WARNING = 0.92
"""Share of the GPU's memory."""
MIN_PHASE_SHARE = 0.01
STALE_SECONDS = 60.0
"""Seconds without an event after which the header shows the time since the last one."""


def shown_state(state: State, view: View) -> State:
    """Returns the state of the stage that the view selects, with the current one if there is no such stage."""
    if 0 < view.stage <= len(state.finished_stages):
        return state.finished_stages[view.stage - 1]
    return state


def header_height(view: View, height: int) -> int:
    """Returns the lines of the header of a screen with `height` lines."""
    return HEAD_LINES + 1 if view.system and height >= MIN_SYSTEM_HEIGHT else HEAD_LINES


def header(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns the header of a screen of this size, about the stage that the view selects."""
    shown = shown_state(state, view)
    head = [
        _title(state, view, width),
        _roles(shown, view, width),
        _progress(shown, view, width),
        _resources(shown, view, width),
    ]
    if not view.system:
        return head
    load = system_line(view.system, view, width)
    if height >= MIN_SYSTEM_HEIGHT:
        return [*head, load]
    # the roles do not change, and a small screen needs its lines for the log
    return [head[0], load, *head[2:]]


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
    if shown is not state and shown.started is not None:
        sign = view.symbol(" \u00b7 ", " - ")
        status_text = f"{status_text}{sign}] to stage {shown.started.stage + 1}"
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
