"""The panes of the dashboard: charts, what the model answers, the log, the help. Each is a pure function that fills its
cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_tune.events import SampleLogged
from lowrank_tune.ui.formatting import METRIC_FORMATS, clock, number, percent, signed
from lowrank_tune.ui.metrics import (
    BAND_METRIC,
    GENERATIVE_ALGORITHMS,
    SIDE_TITLES,
    TITLES,
    charts_of,
    metric_label,
    pair_side,
    reward_label,
    reward_names,
)
from lowrank_tune.ui.reward_vs_accuracy import frontier
from lowrank_tune.ui.state import ScoredPair, State
from lowrank_tune.ui.terminal.charts import Curve, chart, format_number, smooth
from lowrank_tune.ui.terminal.text_layout import Line, sanitize, width_of, wrap

SMOOTHINGS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
KEYS = {
    "q": "save and quit",
    "p": "pause, and go on",
    "s": "save now",
    "e": "evaluate now",
    "n": "next question",
    "g": "the completions of the newest group; g or Esc leaves",
    "l": "log scale",
    "+": "smoother curves",
    "-": "less smooth",
    "?": "this help",
}
PLAIN_FORMAT_METRICS = (
    "accuracy",
    "mean_token_accuracy",
    "rewards/accuracies",
    "learning_rate",
    "heldout/accuracy",
    "frac_reward_zero_std",
    "completions/clipped_ratio",
    "clip_ratio",
    "completions/mean_length",
)
# a chart over no steps: its place among the others, and the points it needs
FRONTIER = "reward against KL"
FRONTIER_INDEX = 5
MIN_FRONTIER_DOTS = 3
MIN_SPAN = 0.2  # share of held-out questions
QUESTION_LINES = 4  # that a further question needs
MIN_TITLE_WIDTH = 23  # cells of a pane's title that its right part must leave
RUN_ONLY_KEYS = "qpse"  # what only the run's own screen can do; in `watch`, q leaves the screen alone


@dataclass(frozen=True)
class View:
    """How a person wants to see the state, and what only the moment knows: requests that wait, the clock, the GPU."""

    log_scale: bool = False
    smoothing: int = 2
    sample: int = 0
    help: bool = False
    group: bool = False
    ascii_only: bool = False
    owns_run: bool = True
    keys: bool = True
    pending: tuple[str, ...] = ()
    now: float | None = None
    gpu: str = ""


def keys_of(state: State, view: View) -> list[str]:
    """The keys that do something here."""
    generates = state.group is not None or (
        state.started is not None and state.started.algorithm in GENERATIVE_ALGORITHMS
    )
    return [
        key for key in KEYS if (view.owns_run or key not in RUN_ONLY_KEYS or key == "q") and (generates or key != "g")
    ]


def chart_names(state: State) -> list[tuple[str, ...]]:
    """The charts to draw: those of the algorithm that were measured, then what it does not always have. Several rewards
    share one."""
    algorithm_charts = charts_of(state.started.algorithm if state.started else "sft")
    names = [chart for names in algorithm_charts if (chart := tuple(name for name in names if measured(state, name)))]
    names += [(name,) for name in ("reward", "heldout/accuracy") if name in state.series and (name,) not in names]
    if (
        len(reward_chart := tuple(reward_names(state.series))) > 1
        and state.started is not None
        and state.started.algorithm in GENERATIVE_ALGORITHMS
    ):
        names.insert(min(3, len(names)), reward_chart)
    if (
        state.started is not None
        and state.started.algorithm in GENERATIVE_ALGORITHMS
        and len(frontier(state)) >= MIN_FRONTIER_DOTS
    ):
        names.insert(min(FRONTIER_INDEX, len(names)), (FRONTIER,))
    return names


def measured(state: State, name: str) -> bool:
    return name in state.series or f"eval_{name}" in state.series


def format_value(name: str, value: float) -> str:
    """A value as the plain lines write it, without more digits than a glance takes in."""
    if name in PLAIN_FORMAT_METRICS:
        return METRIC_FORMATS[name][1](value)
    if value == value:
        return format_number(value)
    return "nan"


def chart_pane(
    state: State,
    names: Sequence[str],
    view: View,
    width: int,
    height: int,
) -> list[Line]:
    """A title with the last values, and the chart. One statistic: its values dim, their average bright, validation in a
    second color; or a band around it. Two are the sides of a pair, more are rewards: the averages of all, each in its
    color."""
    if names == (FRONTIER,):
        return _frontier_pane(state, view, width, height)
    titles = SIDE_TITLES if len(names) > 1 else TITLES
    label = titles.get(names[0]) or sanitize(metric_label(names[0]), view.ascii_only)
    if len(names) > 1 and names[0] in reward_names(names):
        label = "rewards"
    title: Line = [(f" {label} ", "title")]
    styles = dict(zip(names, _chart_styles(names), strict=True))
    curves = [curve for name in names for curve in _curves(state, name, view, styles[name])]
    log = view.log_scale and (len(names) == 1 or all(y > 0 for curve in curves for _, y in curve.points))
    title.append(("log " if log else "", "quiet"))
    for name in names:
        title += _last_values(state, name, styles[name], view)
    return [title, *chart(curves, width, height - 1, log, view.ascii_only)]


def _frontier_pane(state: State, view: View, width: int, height: int) -> list[Line]:
    """The reward by the KL to the reference; held-out exact answers are stretched to the same height, for only their
    course counts here."""
    rewards = frontier(state)
    accuracy = frontier(state, "heldout/accuracy")
    low = min(y for _, y in rewards)
    high = max(y for _, y in rewards)
    curves = [Curve(rewards, "first", "*")]
    title: Line = [(" reward against KL  ", "title"), ("reward", "first")]
    if accuracy:
        highest = max(y for _, y in accuracy)
        lowest = min(highest - MIN_SPAN, *(y for _, y in accuracy))  # a wiggle of two points shall not fill the pane
        curves.append(
            Curve([(x, low + (y - lowest) / (highest - lowest) * (high - low)) for x, y in accuracy], "second", "o")
        )
        title.append(("  exact", "second"))
    return [title, *chart(curves, width, height - 1, False, view.ascii_only, format_x=format_number)]


CHART_STYLES = (("first", "*"), ("second", "o"), ("chosen", "+"), ("rejected", "-"))
"""Style and sign of the lines of rewards that share a chart; the fifth looks as the first."""
ChartStyle = tuple[str, str, str]


def _chart_styles(names: Sequence[str]) -> list[ChartStyle | None]:
    """Label, style and sign of each of several lines; a single one has none."""
    if len(names) < 2:
        return [None for _ in names]
    if all(sides := [pair_side(name) for name in names]):
        return [(side, side, "+" if side == "chosen" else "-") for side in sides]
    return [(reward_label(name), *CHART_STYLES[index % len(CHART_STYLES)]) for index, name in enumerate(names)]


def _band(state: State, name: str, weight: float) -> list[Curve]:
    """The average of a statistic with that of its spread above and below."""
    series = state.series.get(name)
    spread = state.series.get(BAND_METRIC.get(name, ""))
    if series is None or spread is None:
        return []
    both = [(x, y, around) for (x, y), (_, around) in zip(series.points, spread.points, strict=False)]
    return [Curve(smooth([(x, y + sign * around) for x, y, around in both], weight), "quiet", ".") for sign in (1, -1)]


def _curves(state: State, name: str, view: View, style: ChartStyle | None) -> list[Curve]:
    series = state.series.get(name)
    checked = state.series.get(f"eval_{name}")
    weight = SMOOTHINGS[view.smoothing]
    if style is not None:
        shown = series or checked
        if shown is None:
            return []
        return [Curve(smooth(shown.points, weight), style[1], style[2])]
    if series is not None and name == "heldout/accuracy":  # measured seldom: each point counts
        return [Curve(series.points, "first", "*")]
    curves = _band(state, name, weight)
    if curves and series is not None:
        curves.append(Curve(smooth(series.points, weight), "first", "*"))
    elif series is not None:
        curves += [Curve([*series.points], "quiet", ".", line=False)] if weight else []
        curves.append(Curve(smooth(series.points, weight), "first", "*"))
    if checked is not None:
        curves.append(Curve(checked.points, "second", "o"))
    return curves


def _last_values(state: State, name: str, style: ChartStyle | None, view: View) -> Line:
    series = state.series.get(name)
    checked = state.series.get(f"eval_{name}")
    if style is not None:
        shown = series or checked
        if shown is None:
            return []
        return [
            (f"{sanitize(style[0], view.ascii_only, 16)} ", "quiet"),
            (f"{format_value(name, shown.last)} ", style[1]),
        ]
    values: Line = [(format_value(name, series.last), "first")] if series is not None else []
    if (spread := state.last(BAND_METRIC.get(name, ""))) is not None:
        values.append((f" {'+-' if view.ascii_only else chr(0xB1)} {format_value(name, spread)}", "quiet"))
    return values + (
        [("  validation ", "quiet"), (format_value(name, checked.last), "second")] if checked is not None else []
    )


def heading(text: str, width: int, view: View, right: str = "") -> Line:
    """The title of a pane, with a rule to its end."""
    rule = "-" if view.ascii_only else "\u2500"
    right = f" {right}" if right else ""
    left = width - len(text) - len(right) - 5
    return [(rule * 2 + " ", "quiet"), (text, "title"), (f" {rule * max(0, left)}{right} ", "quiet")]


def sample_pane(state: State, view: View, width: int, height: int) -> list[Line]:
    """One held-out question: what the model answered first and what it answers now, and the held-out figures; or a pair
    and its scores."""
    if state.pairs:
        return _pairs(state, view, width, height)
    note = _heldout_line(state, view, width - MIN_TITLE_WIDTH)
    prompts = list({**state.answers, **state.earlier})
    if not prompts:
        return [heading("answers", width, view, note), [(" no answers yet", "quiet")]]
    index = view.sample % len(prompts)
    count = len(prompts)
    lines = [heading(f"question {index + 1} of {count}", width, view, note)]
    for turn in range(count):  # the chosen one, and as many after it as there is room for
        room = height - len(lines) - (turn > 0)
        if turn and room < QUESTION_LINES:
            break
        lines += [[("", "")]] if turn else []
        prompt = prompts[(index + turn) % count]
        lines += _question(
            prompt,
            _sampled_roles(state, prompt),
            view,
            width,
            room if count == 1 else min(room, max(QUESTION_LINES, height // 2)),
        )
    return lines


def _heldout_line(state: State, view: View, width: int) -> str:
    """The held-out figures of all who were asked; where that is too long, of the first and the last."""
    figures = [
        f"{sanitize(who, view.ascii_only, 12)} {percent(stats['accuracy'])}"
        for who, stats in state.heldout.items()
        if "accuracy" in stats
    ]
    figures += [f"now {percent(state.now['accuracy'])} (pass@1)"] if "accuracy" in state.now else []
    ends = figures if len(figures) < 3 else [figures[0], figures[-1]]
    for text in (f"held-out exact: {', '.join(figures)}", f"exact: {', '.join(figures)}", f"exact: {', '.join(ends)}"):
        if figures and len(text) <= width:
            return text
    return ""


def _sampled_roles(state: State, prompt: str) -> list[tuple[str, SampleLogged]]:
    """Who answered a question: the stages before, the reference, and the policy now."""
    answers = state.answers.get(prompt, [])
    now = [
        (state.reference_name() if sample.role == "reference" else f"step {sample.step}", sample)
        for sample in dict.fromkeys([*answers[:1], *answers[-1:]])
    ]
    return [(who, sample) for who, sample in state.earlier.get(prompt, ()) if who not in dict(now)] + now


def _question(
    prompt: str,
    answers: Sequence[tuple[str, SampleLogged]],
    view: View,
    width: int,
    height: int,
) -> list[Line]:
    """What was asked, what was answered first, and what is answered now; of several stages as many as there is room
    for."""
    prompt_lines = wrap(sanitize(prompt, view.ascii_only, 4 * width), width - 2, max(1, height // 4))
    lines: list[Line] = [[(f" {text}", "strong")] for text in prompt_lines]
    shown = answers[-max(1, height - len(prompt_lines)) :]
    for index, (who, answer) in enumerate(shown):
        room = max(1, (height - len(lines)) // (len(shown) - index))
        lines += _answer(who, answer, view, width, room, index == len(shown) - 1)
    return lines


def _pairs(state: State, view: View, width: int, height: int) -> list[Line]:
    """Held-out pairs: both answers with what they score."""
    pairs = list(state.pairs.values())
    index = view.sample % len(pairs)
    count = len(pairs)
    note = f"{sum(pair.margin > 0 for pair in pairs)} of {count} right"
    scored = state.scored.get(state.started.algorithm if state.started else "", {})
    if "accuracy" in scored:
        note = f"held-out pairs right: {percent(scored['accuracy'])}"
    lines = [heading(f"pair {index + 1} of {count}", width, view, note)]
    for turn in range(count):
        room = height - len(lines) - (turn > 0)
        if turn and room < QUESTION_LINES:
            break
        lines += [[("", "")]] if turn else []
        lines += _pair(
            pairs[(index + turn) % count],
            view,
            width,
            room if count == 1 else min(room, max(QUESTION_LINES, height // 2)),
        )
    return lines


def _pair(pair: ScoredPair, view: View, width: int, height: int) -> list[Line]:
    """The prompt, then both answers, the one that is preferred in the light."""
    prompt_lines = wrap(sanitize(pair.chosen.prompt, view.ascii_only, 4 * width), width - 2, max(1, height // 4))
    lines: list[Line] = [[(f" {text}", "strong")] for text in prompt_lines]
    for left, side, answer in ((2, "chosen", pair.chosen), (1, "rejected", pair.rejected)):
        room = max(1, (height - len(lines)) // left)
        label = f" {side:<8} {'' if answer.reward is None else signed(answer.reward):>8}  "
        rows = wrap(sanitize(answer.completion, view.ascii_only, room * width), width - len(label) - 1, room) or [""]
        ahead = pair.margin > 0 if side == "chosen" else pair.margin < 0
        for row, part in enumerate(rows):
            lines.append([(label if row == 0 else " " * len(label), side), (part, "first" if ahead else "")])
    return lines


def _answer(
    label: str,
    answer: SampleLogged,
    view: View,
    width: int,
    room: int,
    newest: bool,
) -> list[Line]:
    """Who answered when, the answer, and what is known of it."""
    label = sanitize(label, view.ascii_only, 10)
    facts = [] if answer.finish_reason == "stop" else ["cut off"]
    if newest and answer.ground_truth is not None:
        facts.append(f"gold {sanitize(answer.ground_truth, view.ascii_only, 24)}")
    if answer.reward is not None:
        facts.append(f"reward {number(answer.reward)}")
    tail = f"  [{', '.join(facts)}]" if facts else ""
    indent = 11
    text = sanitize(answer.completion, view.ascii_only, room * width)
    rows = wrap(text, width - indent - 1 - (len(tail) if room == 1 else 0), room) or [""]
    lines: list[Line] = [
        [(f" {label:<{indent - 1}}" if row == 0 else " " * indent, "quiet"), (part, "first" if newest else "")]
        for row, part in enumerate(rows)
    ]
    if tail and width_of(lines[-1]) + len(tail) > width:
        if len(lines) < room:
            lines.append([(" " * (indent - 2), "")])
        else:
            lines[-1] = [lines[-1][0], ("".join(wrap(rows[-1], width - indent - len(tail), 1)), lines[-1][1][1])]
    lines[-1].append((tail, "quiet"))
    return lines


def log_pane(state: State, view: View, width: int, height: int) -> list[Line]:
    """Warnings first, each part newest first."""
    lines = [
        heading(
            "log",
            width,
            view,
            f"{len(state.warnings)} warning{'s' if len(state.warnings) > 1 else ''}" if state.warnings else "",
        )
    ]
    for entries, style, sign in ((state.warnings, "warning", "!"), (state.log, "", " ")):
        for entry in reversed(entries):
            if len(lines) >= height:
                return lines
            times = f" (x{entry.times})" if entry.times > 1 else ""
            stamp = f"{sign}{clock(entry.time):>6} "
            parts = wrap(sanitize(entry.text, view.ascii_only, 3 * width) + times, width - 9, 3 if style else 2)
            lines += [
                [(stamp if row == 0 else " " * 8, style or "quiet"), (part, style)] for row, part in enumerate(parts)
            ]
    return lines[:height]


def help_pane(state: State, view: View, width: int, height: int) -> list[Line]:
    """The keys, and how to read the screen."""
    lines = [heading("help", width, view)]
    for key in keys_of(state, view):
        lines.append(
            [
                ("  ", ""),
                (f" {key} ", "key"),
                (f"  {KEYS[key] if view.owns_run or key != 'q' else 'leave; the run goes on'}", ""),
            ]
        )
    lines.append([("", "")])
    for text in (
        "Dots are measured values, the bright line is their moving average, the second color is the validation part.",
        "KL is measured in nats a token against the reference named above.",
        "Ctrl-C once: finish the step, save, quit. Twice: quit at once. Ctrl-Z: to the shell; fg brings the screen "
        "back.",
        "From elsewhere: lowrank-tune watch RUN",
    ):
        lines += [[(f"  {part}", "quiet")] for part in wrap(text, width - 4, 3)]
    return lines[:height]
