"""Statistics of a step: means that can be added over micro-batches and steps."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Returns all means as numbers, with one transfer from the device."""
    if not stats:
        return {}
    totals_and_counts = []
    device = torch.device("cpu")
    for mean in stats.values():
        totals_and_counts += [mean.total, mean.count]
    for value in totals_and_counts:
        if isinstance(value, Tensor):
            device = value.device
            break
    on_device = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in totals_and_counts]
    numbers = torch.stack(on_device).view(-1, 2).tolist()
    return {name: WeightedMean(*pair).value for name, pair in zip(stats, numbers, strict=True)}
