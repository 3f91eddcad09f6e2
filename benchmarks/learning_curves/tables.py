"""Tables of a comparison, as Markdown: the time to each accuracy, and the accuracy after each step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from learning_curves.curves import METRICS, NAMES, Curve, Curves, largest_difference, mean_by_step
from learning_curves.task import Settings
from lowrank_tune.ui.formatting import percent


def time_table(settings: Settings, curves: Curves) -> str:
    """Returns the CPU seconds to each accuracy, and of all steps, with the final accuracies."""
    lines = [_row(["", *(f"{NAMES[name]}, mean (range)" for name in curves), "ours / TRL, mean (range)"])]
    lines.append("|" + "---|" * (len(curves) + 2))
    for metric, accuracies in settings.thresholds.items():
        for accuracy in accuracies:
            label = f"CPU s to {100 * accuracy:.0f} % of {METRICS[metric]}"
            lines.append(_seconds_row(label, curves, _to_accuracy(metric, accuracy)))
    if settings.algorithm == "dpo":
        lines.append(_seconds_row("CPU s before the first step (log-probs of the reference)", curves, _prepared))
    lines.append(_seconds_row(f"CPU s of all {settings.steps} steps", curves, _total))
    for metric in next(iter(curves.values()))[0].accuracies:
        finals = [[curve.accuracies[metric][-1] for curve in found] for found in curves.values()]
        cells = [_spread(values, percent) for values in finals]
        lines.append(_row([f"{METRICS[metric]} right at the end", *cells, ""]))
    return "\n".join(lines)


def _to_accuracy(metric: str, accuracy: float) -> Callable[[Curve], float | None]:
    def seconds(curve: Curve) -> float | None:
        return curve.seconds_to(metric, accuracy)

    return seconds


def _prepared(curve: Curve) -> float | None:
    return curve.prepared


def _total(curve: Curve) -> float | None:
    return curve.cpu[-1]


def _seconds_row(label: str, curves: Curves, seconds: Callable[[Curve], float | None]) -> str:
    found = {name: [seconds(curve) for curve in some] for name, some in curves.items()}
    return _row([label, *(_spread(values, seconds_text) for values in found.values()), _ratios(found)])


def _spread(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    """Returns mean and range of the values; how many are missing if some are."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"not reached by {len(values) - len(known)} of {len(values)}"
    return f"{text(statistics.mean(known))} ({text(min(known))} to {text(max(known))})"


def seconds_text(value: float) -> str:
    """Returns seconds with one decimal."""
    return f"{value:.1f}"


def _ratios(found: dict[str, list[float | None]]) -> str:
    """Returns mean and range of the ratios of seeds."""
    if set(found) != {"ours", "trl"}:
        return ""
    ratios = [a / b for a, b in zip(found["ours"], found["trl"], strict=True) if a is not None and b]
    return f"**{statistics.mean(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def step_table(curves: Curves, metric: str) -> str:
    """Returns mean accuracy and CPU seconds of each contender after the same steps."""
    names = [NAMES[name] for name in curves]
    lines = [
        _row(["step", *(f"{METRICS[metric]} right, {name}" for name in names), *(f"CPU s, {name}" for name in names)])
    ]
    lines.append("|" + "---|" * (2 * len(curves) + 1))
    for place, step in enumerate(next(iter(curves.values()))[0].evaluated):
        accuracies = [[curve.accuracies[metric][place] for curve in found] for found in curves.values()]
        seconds = [statistics.mean(curve.seconds_at(step) for curve in found) for found in curves.values()]
        cells = [_spread(values, percent) for values in accuracies]
        lines.append(_row([str(step), *cells, *(f"{value:.1f}" for value in seconds)]))
    return "\n".join(lines)


def agreement(settings: Settings, curves: Curves) -> str:
    """Returns how far the contenders are apart at the same steps."""
    if len(curves) < 2:
        return ""
    pairs = list(zip(*curves.values(), strict=True))
    parts = []
    for metric in pairs[0][0].accuracies:
        lines = [[value for _, value in mean_by_step(found, metric)] for found in curves.values()]
        parts.append(f"{METRICS[metric]} {percent(largest_difference(lines))}")
    text = f"At the same step the means over the seeds differ by at most: {', '.join(parts)}."
    if settings.algorithm == "dpo":
        losses = max(largest_difference([curve.values for curve in pair]) for pair in pairs)
        text += f" The losses of a seed differ by at most {losses:.1e}."
    return text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
