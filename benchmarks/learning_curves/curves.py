"""Figures of a comparison: curves of accuracy over steps and CPU seconds, the time to an accuracy, and their ratios."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from learning_curves.task import Settings, Task

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A contender's run with one seed: CPU and wall seconds after each step, the loss or mean reward of each, and the
    accuracies by metric at the evaluated steps, 0 included."""

    cpu: list[float]
    wall: list[float]
    values: list[float]
    evaluated: list[int]
    accuracies: dict[str, list[float]]

    @staticmethod
    def read(task: Task, contender: str) -> Curve:
        """Returns what a run has written."""
        folder = task.of(contender)
        steps = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
        found = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
        metrics = next(iter(found.values()))
        return Curve(
            [step["cpu"] for step in steps],
            [step["wall"] for step in steps],
            [step["value"] for step in steps],
            [int(step) for step in found],
            {metric: [accuracies[metric] for accuracies in found.values()] for metric in metrics},
        )

    def seconds_at(self, step: int) -> float:
        """Returns the CPU seconds after a step."""
        return self.cpu[step - 1] if step else 0.0

    def by_step(self, metric: str) -> list[Point]:
        """Returns the accuracy after each evaluated step."""
        return [(step, value) for step, value in zip(self.evaluated, self.accuracies[metric], strict=True)]

    def by_seconds(self, metric: str) -> list[Point]:
        """Returns the accuracy at each evaluated step, by CPU seconds."""
        return [
            (self.seconds_at(step), value) for step, value in zip(self.evaluated, self.accuracies[metric], strict=True)
        ]

    def seconds_to(self, metric: str, accuracy: float) -> float | None:
        """Returns the CPU seconds until an accuracy is reached for the first time, on straight lines between the
        evaluated steps; None if it is not."""
        return first_crossing(self.by_seconds(metric), accuracy)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def first_crossing(points: Sequence[Point], height: float) -> float | None:
    """Returns where straight lines through the points reach a height for the first time; None if they do not."""
    if points[0][1] >= height:
        return points[0][0]
    for (x, y), (next_x, next_y) in zip(points, points[1:], strict=False):
        if next_y >= height:
            return x + (next_x - x) * (height - y) / (next_y - y)
    return None


Curves = dict[str, list[Curve]]
"""The curves of each contender, a curve for each seed."""


def mean_by_step(curves: Sequence[Curve], metric: str) -> list[Point]:
    """Returns the mean accuracy over the seeds after each evaluated step."""
    return _mean_points([curve.by_step(metric) for curve in curves])


def mean_by_seconds(curves: Sequence[Curve], metric: str) -> list[Point]:
    """Returns mean accuracy and mean CPU seconds over the seeds at each evaluated step."""
    return _mean_points([curve.by_seconds(metric) for curve in curves])


def _mean_points(lines: Sequence[Sequence[Point]]) -> list[Point]:
    means = []
    for points in zip(*lines, strict=True):
        xs, ys = zip(*points, strict=True)
        means.append((statistics.mean(xs), statistics.mean(ys)))
    return means


def largest_difference(lines: Sequence[Sequence[float]]) -> float:
    """Returns the largest difference of two lines at any place."""
    return max(max(values) - min(values) for values in zip(*lines, strict=True))


# --- Markdown ---------------------------------------------------------------------------------------------------------

NAMES = {"ours": "ours", "trl": "TRL"}
METRICS = {"sampled": "sampled answers", "greedy": "greedy answers", "pairs": "pairs"}


def time_table(settings: Settings, curves: Curves) -> str:
    """Returns the CPU seconds to each accuracy, and of all steps, with the final accuracies."""
    lines = [_row(["", *(f"{NAMES[name]}, mean (range)" for name in curves), "ours / TRL, mean (range)"])]
    lines.append("|" + "---|" * (len(curves) + 2))
    for metric, accuracies in settings.thresholds.items():
        for accuracy in accuracies:
            label = f"CPU s to {accuracy:.0%} of {METRICS[metric]}"
            lines.append(_seconds_row(label, curves, _to_accuracy(metric, accuracy)))
    lines.append(_seconds_row(f"CPU s of all {settings.steps} steps", curves, _total))
    for metric in next(iter(curves.values()))[0].accuracies:
        finals = [[curve.accuracies[metric][-1] for curve in found] for found in curves.values()]
        cells = [_spread(values, "{:.1%}") for values in finals]
        lines.append(_row([f"{METRICS[metric]} right at the end", *cells, ""]))
    return "\n".join(lines)


def _to_accuracy(metric: str, accuracy: float) -> Callable[[Curve], float | None]:
    def seconds(curve: Curve) -> float | None:
        return curve.seconds_to(metric, accuracy)

    return seconds


def _total(curve: Curve) -> float | None:
    return curve.cpu[-1]


def _seconds_row(label: str, curves: Curves, seconds: Callable[[Curve], float | None]) -> str:
    found = {name: [seconds(curve) for curve in some] for name, some in curves.items()}
    return _row([label, *(_spread(values, "{:.1f}") for values in found.values()), _ratios(found)])


def _spread(values: Sequence[float | None], form: str) -> str:
    """Returns mean and range of the values; how many are missing if some are."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"not reached by {len(values) - len(known)} of {len(values)}"
    low, high = form.format(min(known)), form.format(max(known))
    return f"{form.format(statistics.mean(known))} ({low} to {high})"


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
        cells = [_spread(values, "{:.1%}") for values in accuracies]
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
        parts.append(f"{METRICS[metric]} {largest_difference(lines):.1%}")
    text = f"At the same step the means over the seeds differ by at most: {', '.join(parts)}."
    if settings.algorithm == "dpo":
        losses = max(largest_difference([curve.values for curve in pair]) for pair in pairs)
        text += f" The losses of a seed differ by at most {losses:.1e}."
    return text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
