"""Extrapolates from a few layers to all: bytes at a program point, and kernels of a phase, grow linearly with the
layers of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lowrank_tune.memory_planner.allocation_tracker import ProgramPoint
from lowrank_tune.memory_planner.kernel_costs import Kernel
from lowrank_tune.memory_planner.kernel_counter import KernelCounts
from lowrank_tune.memory_planner.meta_model import Layer

Peaks = Mapping[ProgramPoint, Mapping[str, int]]
MIN_LAYERS = 2
"""Simulated layers of a kind: a first and a last one."""


@dataclass(frozen=True)
class LinearInDepth:
    """Peaks of a model with any number of layers: with `base_counts` layers of each kind, and with one more of a
    kind."""

    base_counts: Mapping[Layer, int]
    base_peaks: Peaks
    extra_peaks: Mapping[Layer, Peaks]

    def at_depth(self, counts: Mapping[Layer, int]) -> Peaks:
        """Returns the peaks with these numbers of layers of each kind, at least `base_counts` if there are several
        kinds."""
        peaks = dict[ProgramPoint, dict[str, int]]()
        for point, base_peak in self.base_peaks.items():
            if all(point in extra for extra in self.extra_peaks.values()):
                total = Counter(base_peak)
                for layer, extra in self.extra_peaks.items():
                    num_more = counts[layer] - self.base_counts[layer]
                    for purpose in {*base_peak, *extra[point]}:
                        growth = extra[point].get(purpose, 0) - base_peak.get(purpose, 0)
                        total[purpose] += num_more * growth
                # Only purposes with bytes.
                peaks[point] = dict(+total)
        return peaks


def fit_linear_model(simulate: Callable[[Sequence[Layer]], Peaks], counts: Mapping[Layer, int]) -> LinearInDepth:
    """Simulates the first few layers of each kind, and then one more of each kind that has more.

    A program point is a place in the model (before it, its first layer, its last, after it; forward or backward) in a
    phase. At each point the bytes are linear in the number of layers of each kind, and in the layers between they go
    from those of the first to those of the last. A peak over several points is not linear.
    """
    base_counts = {layer: min(MIN_LAYERS, count) for layer, count in counts.items()}
    base_peaks = simulate(with_num_layers(base_counts))
    extra_peaks = dict[Layer, Peaks]()
    for layer, count in counts.items():
        if count > MIN_LAYERS:
            one_more = {**base_counts, layer: MIN_LAYERS + 1}
            extra_peaks[layer] = simulate(with_num_layers(one_more))
    return LinearInDepth(base_counts, base_peaks, extra_peaks)


def extrapolate_layers(simulate: Callable[[Sequence[Layer]], Peaks], layers: Sequence[Layer]) -> Peaks:
    """Returns the peaks that `simulate` would find with all these layers."""
    counts = Counter(layers)
    return fit_linear_model(simulate, counts).at_depth(counts)


def with_num_layers(counts: Mapping[Layer, int]) -> list[Layer]:
    """Returns the layers in their order: recomputed ones are first."""
    layers = []
    for layer in sorted(counts, key=lambda layer: not layer.recomputed):
        layers += [layer] * counts[layer]
    return layers


def extrapolate_counts(count: Callable[[Sequence[Layer]], KernelCounts], layers: Sequence[Layer]) -> KernelCounts:
    """Returns the kernels that `count` would find with all these layers. A kernel whose size depends on the number of
    layers may have a negative count: sums over all kernels are right."""
    counts = Counter(layers)
    base_counts = {layer: min(MIN_LAYERS, number) for layer, number in counts.items()}
    base = count(with_num_layers(base_counts))
    total = {phase: dict(kernels) for phase, kernels in base.items()}
    for layer, number in counts.items():
        num_more = number - base_counts[layer]
        if num_more:
            extra = count(with_num_layers({**base_counts, layer: MIN_LAYERS + 1}))
            for phase, kernels in total.items():
                _add_growth(
                    kernels,
                    base[phase],
                    extra[phase],
                    num_more,
                )
    return total


def _add_growth(
    total: dict[Kernel, float],
    base: Mapping[Kernel, float],
    extra: Mapping[Kernel, float],
    num_more: int,
) -> None:
    """Adds `num_more` times what `extra` has more than `base`."""
    for kernel in {*base, *extra}:
        growth = extra.get(kernel, 0) - base.get(kernel, 0)
        total[kernel] = total.get(kernel, 0) + num_more * growth
