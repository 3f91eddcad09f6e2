"""A plan: what each phase of a run holds at its highest point, and whether the GPU has room for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowrank_tune.memory_planner.sizes import Sizes

GIB = 1 << 30
CUDA_CONTEXT_BYTES = 800_000_000
"""Bytes that CUDA takes for itself before the first tensor: its context, the kernels of torch, and cuBLAS's
workspace."""
FRAGMENTATION = 0.04
"""Share of the rest that the allocator cannot use (`expandable_segments`)."""
PURPOSES = ("weights", "adapters", "optimizer", "gradients", "activations", "logits", "KV cache")

PHASE_SEPARATOR = ": "
"""Between a phase and which of its passes it is, in the name of a moment."""
DECODING_PHASES = ("rollout", "held-out answers")
"""Phases that decode: with fewer sequences at once they hold less."""
NON_UPDATE_PHASES = (*DECODING_PHASES, "reference", "reward model", "old and reference", "validation")
"""Phases whose pieces are not micro-batches of the update."""
SPLITTABLE_PHASES = NON_UPDATE_PHASES[2:]
"""Those of them that go on in smaller pieces where memory is short (`model/oom.py`), so that they forbid
nothing."""


@dataclass(frozen=True)
class Phase:
    """A phase at its highest point: bytes by purpose, and where in the model that is."""

    name: str
    bytes: Mapping[str, int]
    where: str = ""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Plan:
    """One stage. `vram` are the bytes that there are, 0 where nobody asks (on a CPU); `notes` what the figures
    suppose."""

    name: str
    algorithm: str
    model: str
    bits: int
    device: str
    layers: int
    recomputed: int
    sizes: Sizes
    phases: tuple[Phase, ...]
    vram: int
    notes: tuple[str, ...] = ()
    max_micro_batch_size: int | None = None
    """The largest micro-batch that fits, at this length."""
    fits_length: int | None = None
    """The longest rows that fit, in micro-batches of this size."""
    advice: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs most, of those that run whole."""
        return max((phase for phase in self.phases if phase not in self.split_phases), key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of tensors at the highest point of the phases that run whole: phases share bytes, so it is a maximum
        and no sum."""
        return self.peak_phase.total

    @property
    def split_phases(self) -> tuple[Phase, ...]:
        """Phases that run in smaller pieces, because at once they need more than there is."""
        return tuple(
            phase
            for phase in self.phases
            if phase.name in SPLITTABLE_PHASES and 0 < self.vram < needed(phase.total, self.device)
        )

    @property
    def needed(self) -> int:
        """Bytes that the device must have for it."""
        return needed(self.peak, self.device)

    @property
    def fits(self) -> bool:
        """Whether nothing that must be held at once is more than there is."""
        return not self.vram or self.needed <= self.vram


def needed(peak: int, device: str) -> int:
    """Bytes that a device must have for tensors of so many bytes at once."""
    if device == "cpu":
        return peak
    return CUDA_CONTEXT_BYTES + round(peak / (1 - FRAGMENTATION))
