"""Statistics of a step: means that can be added over micro-batches and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightedMean:
    """A mean as total and count, so that means can be added. Both are 0-d tensors or numbers."""

    total: Tensor | float
    count: Tensor | float

    def __add__(self, other: WeightedMean) -> WeightedMean:
        return WeightedMean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; nan for a count of 0."""
        count = float(self.count)
        if count:
            return float(self.total) / count
        return float("nan")


Stats = dict[str, WeightedMean]


def add_stats(into: Stats, more: Mapping[str, WeightedMean]) -> None:
    """Adds `more` to `into`, name by name."""
    for name, mean in more.items():
        if name in into:
            into[name] = into[name] + mean
        else:
            into[name] = mean


def to_floats(stats: Mapping[str, WeightedMean]) -> dict[str, float]:
    """Returns all means as numbers, with one transfer from each device."""
    values: list[Tensor | float] = []
    for mean in stats.values():
        values += [mean.total, mean.count]
    numbers = _read_values(values)
    return {name: WeightedMean(numbers[2 * place], numbers[2 * place + 1]).value for place, name in enumerate(stats)}


def _read_values(values: Sequence[Tensor | float]) -> list[float]:
    """Returns the values of numbers and 0-d tensors. Statistics of the rollouts are on the CPU, those of the update on
    the GPU: copying either to the other device one by one would wait for the GPU each time."""
    numbers = [0.0] * len(values)
    by_device: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(place)
        else:
            numbers[place] = float(value)
    for places in by_device.values():
        tensors = [torch.as_tensor(values[place], dtype=torch.float64) for place in places]
        for place, number in zip(places, torch.stack(tensors).tolist(), strict=True):
            numbers[place] = number
    return numbers
