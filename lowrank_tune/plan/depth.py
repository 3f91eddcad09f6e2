"""From a few layers to all of them: what a moment holds grows by the same bytes with each further layer of a kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lowrank_tune.plan.base import Layer
from lowrank_tune.plan.ledger import Moment

Peaks = Mapping[Moment, Mapping[str, int]]
FEW = 2
"""Layers of a kind that are rehearsed: a first and a last one."""


def deep(rehearse: Callable[[Sequence[Layer]], Peaks], layers: Sequence[Layer]) -> Peaks:
    """What `rehearse` would find with all these layers, from rehearsals of the first few and of one more of each kind.

    A moment is a place in the model (before it, its first layer, its last, behind it; forward or backward) in a phase. At each of them the
    bytes are linear in the number of layers of each kind, and over the layers between they run from those of the first to those of the last;
    a peak, the greatest of several lines, is not.
    """
    counts = Counter(layers)
    few = {layer: min(FEW, count) for layer, count in counts.items()}
    found = rehearse(_so_many(few))
    total = {moment: Counter(peak) for moment, peak in found.items()}
    for layer, count in counts.items():
        if count > FEW:
            more = rehearse(_so_many({**few, layer: FEW + 1}))
            for moment in list(total):
                if moment not in more:
                    del total[moment]
                    continue
                for purpose in {*found[moment], *more[moment]}:
                    total[moment][purpose] += (count - FEW) * (more[moment].get(purpose, 0) - found[moment].get(purpose, 0))
    return {moment: {purpose: size for purpose, size in peak.items() if size > 0} for moment, peak in total.items()}


def _so_many(counts: Mapping[Layer, int]) -> list[Layer]:
    """In their order: recomputed ones come first."""
    return [layer for layer in sorted(counts, key=lambda one: not one.recomputed) for _ in range(counts[layer])]
