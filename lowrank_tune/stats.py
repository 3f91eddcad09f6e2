"""Statistics of a step: means that can be added over micro-batches and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightedMean:
    """A mean that adds: total over count. Both are 0-d tensors or numbers."""

    total: Tensor | float
    count: Tensor | float

    def __add__(self, other: WeightedMean) -> WeightedMean:
        return WeightedMean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        count = float(self.count)
        if count:
            return float(self.total) / count
        return float("nan")


Stats = dict[str, WeightedMean]


def add_stats(into: Stats, more: Mapping[str, WeightedMean]) -> None:
    """Adds `more` to `into`, name by name."""
    for name, mean in more.items():
        into[name] = into[name] + mean if name in into else mean


def to_floats(stats: Mapping[str, WeightedMean]) -> dict[str, float]:
    """All means as numbers, with one transfer from the device."""
    flat = [value for mean in stats.values() for value in (mean.total, mean.count)]
    device = next((value.device for value in flat if isinstance(value, Tensor)), torch.device("cpu"))
    if flat:
        host = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in flat]).tolist()
    else:
        host = []
    return {name: WeightedMean(host[2 * i], host[2 * i + 1]).value for i, name in enumerate(stats)}
