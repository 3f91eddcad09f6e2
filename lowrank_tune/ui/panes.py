"""The panes of the dashboard: charts, what the model answers, the log, the help. Each is a pure function that fills its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_tune.events import Sampled
from lowrank_tune.ui.charts import Curve, chart, short, smooth
from lowrank_tune.ui.frame import Line, said, width_of, wrap
from lowrank_tune.ui.plain import SHOWN, clock, number, percent
from lowrank_tune.ui.state import State

SMOOTHINGS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
KEYS = {
    "q": "save and quit", "p": "pause, and go on", "s": "save now", "e": "evaluate now", "n": "next question", "l": "log scale",
    "+": "smoother curves", "-": "less smooth", "?": "this help",
}  # fmt: skip
QUESTION_LINES = 4  # that a further question needs
FOR_THE_RUN = "qpse"  # what only the run's own screen can do; in `watch`, q leaves the screen alone
CHARTS: dict[str, tuple[str, ...]] = {
    "sft": ("loss", "kl", "grad_norm", "learning_rate", "accuracy", "entropy"),
    "reward": ("loss", "accuracy", "margin", "grad_norm", "learning_rate", "kl"),
    "dpo": ("loss", "margin", "accuracy", "kl", "grad_norm", "learning_rate"),
    "grpo": ("reward", "kl", "entropy", "grad_norm", "learning_rate", "loss"),
    "ppo": ("reward", "kl", "value_loss", "entropy", "grad_norm", "learning_rate"),
}
TITLES = {"loss": "loss", "kl": "KL to the reference", "grad_norm": "gradient norm", "learning_rate": "learning rate"}


@dataclass(frozen=True)
class View:
    """How a person wants to see the state, and what only the moment knows: wishes that wait, the clock, the card."""

    log_scale: bool = False
    smoothing: int = 2
    sample: int = 0
    help: bool = False
    ascii_only: bool = False
    mine: bool = True
    keys: bool = True
    asked: tuple[str, ...] = ()
    now: float | None = None
    card: str = ""


def chart_names(state: State) -> list[str]:
    """The statistics to draw: those of the algorithm that were measured, then reward where there is one."""
    wanted = CHARTS.get(state.started.algorithm if state.started else "sft", CHARTS["sft"])
    names = [name for name in wanted if name in state.series or f"validation_{name}" in state.series]
    return names + [name for name in ("reward",) if name in state.series and name not in names]


def written(name: str, value: float) -> str:
    """A value as the plain lines write it, without more digits than a glance takes in."""
    return SHOWN[name][1](value) if name in ("accuracy", "learning_rate") else short(value) if value == value else "nan"


def chart_pane(state: State, name: str, view: View, width: int, height: int) -> list[Line]:
    """A title with the last values, and the chart: raw values dim, their average bright, validation in a second colour."""
    told = TITLES.get(name, said(name, view.ascii_only).replace("_", " "))
    title: Line = [(f" {told} ", "title"), ("log " if view.log_scale else "", "quiet")]
    curves = []
    if (series := state.series.get(name)) is not None:
        title.append((written(name, series.last), "first"))
        points = [*series.points]
        weight = SMOOTHINGS[view.smoothing]
        if weight:
            curves.append(Curve(points, "quiet", ".", line=False))
        curves.append(Curve(smooth(points, weight), "first", "*"))
    if (checked := state.series.get(f"validation_{name}")) is not None:
        title += [("  validation ", "quiet"), (written(name, checked.last), "second")]
        curves.append(Curve(checked.points, "second", "o"))
    return [title, *chart(curves, width, height - 1, view.log_scale, view.ascii_only)]


def heading(text: str, width: int, view: View, right: str = "") -> Line:
    """The title of a pane, with a rule to its end."""
    rule, right = "-" if view.ascii_only else "\u2500", f" {right}" if right else ""
    left = width - len(text) - len(right) - 5
    return [(rule * 2 + " ", "quiet"), (text, "title"), (f" {rule * max(0, left)}{right} ", "quiet")]


def sample_pane(state: State, view: View, width: int, height: int) -> list[Line]:
    """One held-out question: what the model answered first and what it answers now, and the held-out figures."""
    figures = [f"{said(who, view.ascii_only, 12)} {percent(stats['exact'])}" for who, stats in state.heldout.items() if "exact" in stats]
    told = f"held-out exact: {', '.join(figures)}" if figures else ""
    if not state.answers:
        return [heading("answers", width, view, told), [(" no answers yet", "quiet")]]
    place, count = view.sample % len(state.answers), len(state.answers)
    prompts = list(state.answers)
    lines = [heading(f"question {place + 1} of {count}", width, view, told)]
    for turn in range(count):  # the chosen one, and as many after it as there is room for
        room = height - len(lines) - (turn > 0)
        if turn and room < QUESTION_LINES:
            break
        lines += [[("", "")]] if turn else []
        prompt = prompts[(place + turn) % count]
        lines += _question(prompt, state.answers[prompt], view, width, room if count == 1 else min(room, max(QUESTION_LINES, height // 2)))
    return lines


def _question(prompt: str, answers: Sequence[Sampled], view: View, width: int, height: int) -> list[Line]:
    """What was asked, what the model answered first, and what it answers now."""
    asked = wrap(said(prompt, view.ascii_only, 4 * width), width - 2, max(1, height // 4))
    lines: list[Line] = [[(f" {text}", "strong")] for text in asked]
    shown = [answers[0], answers[-1]] if len(answers) > 1 and height - len(asked) >= 2 else answers[-1:]
    for index, answer in enumerate(shown):
        room = max(1, (height - len(lines)) // (len(shown) - index))
        lines += _answer(answer, view, width, room, index == len(shown) - 1)
    return lines


def _answer(answer: Sampled, view: View, width: int, room: int, newest: bool) -> list[Line]:
    """Who answered when, the answer, and what is known of it."""
    label = "base" if answer.role == "reference" else f"step {answer.step}"
    facts = [] if answer.finish == "stop" else ["cut off"]
    if newest and answer.gold is not None:
        facts.append(f"gold {said(answer.gold, view.ascii_only, 24)}")
    if answer.reward is not None:
        facts.append(f"reward {number(answer.reward)}")
    tail = f"  [{', '.join(facts)}]" if facts else ""
    indent = 11
    text = said(answer.completion, view.ascii_only, room * width)
    rows = wrap(text, width - indent - 1 - (len(tail) if room == 1 else 0), room) or [""]
    lines: list[Line] = [[(f" {label:<{indent - 1}}" if row == 0 else " " * indent, "quiet"), (part, "first" if newest else "")]
                         for row, part in enumerate(rows)]  # fmt: skip
    if tail and width_of(lines[-1]) + len(tail) > width:
        if len(lines) < room:
            lines.append([(" " * (indent - 2), "")])
        else:
            lines[-1] = [lines[-1][0], ("".join(wrap(rows[-1], width - indent - len(tail), 1)), lines[-1][1][1])]
    lines[-1].append((tail, "quiet"))
    return lines


def log_pane(state: State, view: View, width: int, height: int) -> list[Line]:
    """Warnings first, each part newest first."""
    begun = state.begun or 0.0
    lines = [heading("log", width, view, f"{len(state.warnings)} warning{'s' if len(state.warnings) > 1 else ''}" if state.warnings else "")]
    for entries, style, sign in ((state.warnings, "warning", "!"), (state.log, "", " ")):
        for entry in reversed(entries):
            if len(lines) >= height:
                return lines
            times = f" (x{entry.times})" if entry.times > 1 else ""
            stamp = f"{sign}{clock(entry.time - begun):>6} "
            parts = wrap(said(entry.text, view.ascii_only, 3 * width) + times, width - 9, 3 if style else 2)
            lines += [[(stamp if row == 0 else " " * 8, style or "quiet"), (part, style)] for row, part in enumerate(parts)]
    return lines[:height]


def help_pane(view: View, width: int, height: int) -> list[Line]:
    """The keys, and how to read the screen."""
    lines = [heading("help", width, view)]
    for key, what in KEYS.items():
        if view.mine or key not in FOR_THE_RUN or key == "q":
            lines.append([("  ", ""), (f" {key} ", "key"), (f"  {what if view.mine or key != 'q' else 'leave; the run goes on'}", "")])
    lines.append([("", "")])
    for text in (
        "Dots are measured values, the bright line is their moving average, the second colour is the validation part.",
        "KL is measured in nats a token against the reference named above.",
        "Ctrl-C once: finish the step, save, quit. Twice: quit at once. Ctrl-Z: to the shell; fg brings the screen back.",
        "From elsewhere: lowrank-tune watch RUN",
    ):
        lines += [[(f"  {part}", "quiet")] for part in wrap(text, width - 4, 3)]
    return lines[:height]
