"""From a few layers to all of them: what a moment holds grows by the same bytes with each further layer of a kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lowrank_tune.memory_planner.allocation_tracker import ProgramPoint
from lowrank_tune.memory_planner.meta_model import Layer

Peaks = Mapping[ProgramPoint, Mapping[str, int]]
MIN_LAYERS = 2
"""Layers of a kind that are rehearsed: a first and a last one."""


@dataclass(frozen=True)
class LinearInDepth:
    """What a model of any depth holds: at `base_counts` layers of each kind, and what one more of a kind adds."""

    base_counts: Mapping[Layer, int]
    base_peaks: Peaks
    extra_peaks: Mapping[Layer, Peaks]

    def at_depth(self, counts: Mapping[Layer, int]) -> Peaks:
        """With so many layers of each kind: as few as were rehearsed at least, where there were two kinds or more."""
        total = {
            point: Counter(peak)
            for point, peak in self.base_peaks.items()
            if all(point in extra for extra in self.extra_peaks.values())
        }
        for layer, extra in self.extra_peaks.items():
            for point, peak in total.items():
                for purpose in {*self.base_peaks[point], *extra[point]}:
                    growth = extra[point].get(purpose, 0) - self.base_peaks[point].get(purpose, 0)
                    peak[purpose] += (counts[layer] - self.base_counts[layer]) * growth
        return {point: {purpose: size for purpose, size in peak.items() if size > 0} for point, peak in total.items()}


def fit_linear_model(simulate: Callable[[Sequence[Layer]], Peaks], counts: Mapping[Layer, int]) -> LinearInDepth:
    """A model of layers of these kinds, from rehearsals of the first few and of one more of each kind that there are
    more of.

    A moment is a place in the model (before it, its first layer, its last, behind it; forward or backward) in a phase.
    At each of them the bytes are linear in the number of layers of each kind, and over the layers between they run from
    those of the first to those of the last; a peak, the greatest of several lines, is not.
    """
    base_counts = {layer: min(MIN_LAYERS, count) for layer, count in counts.items()}
    base_peaks = simulate(_with_num_layers(base_counts))
    return LinearInDepth(
        base_counts,
        base_peaks,
        {
            layer: simulate(_with_num_layers({**base_counts, layer: MIN_LAYERS + 1}))
            for layer, count in counts.items()
            if count > MIN_LAYERS
        },
    )


def extrapolate_layers(simulate: Callable[[Sequence[Layer]], Peaks], layers: Sequence[Layer]) -> Peaks:
    """What `simulate` would find with all these layers."""
    counts = Counter(layers)
    return fit_linear_model(simulate, counts).at_depth(counts)


def _with_num_layers(counts: Mapping[Layer, int]) -> list[Layer]:
    """In their order: recomputed ones come first."""
    return [layer for layer in sorted(counts, key=lambda one: not one.recomputed) for _ in range(counts[layer])]
