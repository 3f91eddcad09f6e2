"""From a few layers to all of them: what a moment holds grows by the same bytes with each further layer of a kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lowrank_tune.plan.base import Layer
from lowrank_tune.plan.ledger import Moment

Peaks = Mapping[Moment, Mapping[str, int]]
FEW = 2
"""Layers of a kind that are rehearsed: a first and a last one."""


@dataclass(frozen=True)
class Model:
    """What a model of any depth holds: at `few` layers of each kind, and what one more of a kind adds."""

    few: Mapping[Layer, int]
    found: Peaks
    more: Mapping[Layer, Peaks]

    def of(self, counts: Mapping[Layer, int]) -> Peaks:
        """With so many layers of each kind: as few as were rehearsed at least, where there were two kinds or more."""
        total = {
            moment: Counter(peak)
            for moment, peak in self.found.items()
            if all(moment in more for more in self.more.values())
        }
        for layer, more in self.more.items():
            for moment, peak in total.items():
                for purpose in {*self.found[moment], *more[moment]}:
                    grows = more[moment].get(purpose, 0) - self.found[moment].get(purpose, 0)
                    peak[purpose] += (counts[layer] - self.few[layer]) * grows
        return {moment: {purpose: size for purpose, size in peak.items() if size > 0} for moment, peak in total.items()}


def model_of(rehearse: Callable[[Sequence[Layer]], Peaks], counts: Mapping[Layer, int]) -> Model:
    """A model of layers of these kinds, from rehearsals of the first few and of one more of each kind that there are
    more of.

    A moment is a place in the model (before it, its first layer, its last, behind it; forward or backward) in a phase.
    At each of them the bytes are linear in the number of layers of each kind, and over the layers between they run from
    those of the first to those of the last; a peak, the greatest of several lines, is not.
    """
    few = {layer: min(FEW, count) for layer, count in counts.items()}
    found = rehearse(_so_many(few))
    return Model(
        few,
        found,
        {layer: rehearse(_so_many({**few, layer: FEW + 1})) for layer, count in counts.items() if count > FEW},
    )


def deep(rehearse: Callable[[Sequence[Layer]], Peaks], layers: Sequence[Layer]) -> Peaks:
    """What `rehearse` would find with all these layers."""
    counts = Counter(layers)
    return model_of(rehearse, counts).of(counts)


def _so_many(counts: Mapping[Layer, int]) -> list[Layer]:
    """In their order: recomputed ones come first."""
    return [layer for layer in sorted(counts, key=lambda one: not one.recomputed) for _ in range(counts[layer])]
