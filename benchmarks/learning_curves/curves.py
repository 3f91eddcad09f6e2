"""Curves of a comparison: accuracy over steps and over CPU seconds, their means, and the time to an accuracy."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from learning_curves.task import Task

Point = tuple[float, float]
NAMES = {"ours": "ours", "trl": "TRL"}
METRICS = {"sampled": "sampled answers", "greedy": "greedy answers", "pairs": "pairs"}


@dataclass(frozen=True)
class Curve:
    """A contender's run with one seed: CPU seconds before the first step (`prepared`), CPU and wall seconds after each
    step, the loss or mean reward of each, and the accuracies by metric at the evaluated steps, 0 included."""

    prepared: float
    cpu: list[float]
    wall: list[float]
    values: list[float]
    evaluated: list[int]
    accuracies: dict[str, list[float]]

    @staticmethod
    def read(task: Task, contender: str) -> Curve:
        """Returns what a run has written."""
        folder = task.of(contender)
        record = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
        steps = record["steps"]
        found = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
        metrics = next(iter(found.values()))
        return Curve(
            record["prepared"],
            [step["cpu"] for step in steps],
            [step["wall"] for step in steps],
            [step["value"] for step in steps],
            [int(step) for step in found],
            {metric: [accuracies[metric] for accuracies in found.values()] for metric in metrics},
        )

    def seconds_at(self, step: int) -> float:
        """Returns the CPU seconds after a step."""
        return self.cpu[step - 1] if step else self.prepared

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
