"""A plan: the bytes of each phase of a run at its peak, and whether they fit the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowrank_tune.memory_planner.sizes import Sizes

GIB = 1 << 30
CUDA_CONTEXT_BYTES = 800_000_000
"""Bytes that CUDA uses before the first tensor: its context, torch's kernels, and cuBLAS' workspace."""
FRAGMENTATION = 0.04
"""Share of the rest that the allocator cannot use (`expandable_segments`)."""
GRAPHS = "CUDA graphs"
PURPOSES = (
    "weights",
    "adapters",
    "optimizer",
    "gradients",
    "activations",
    "logits",
    "KV cache",
    GRAPHS,
)

PHASE_SEPARATOR = ": "
"""Separates the name of a phase from the name of its pass, in a program point."""
DECODING_PHASES = ("rollout", "held-out answers")
"""Phases that decode: with fewer sequences at once they need less."""
KL_ESTIMATE = "KL estimate"
NON_UPDATE_PHASES = (
    *DECODING_PHASES,
    "reference",
    KL_ESTIMATE,
    "reward model",
    "old and reference",
    "validation",
)
"""Phases that do not use the micro-batches of the update."""
SPLITTABLE_PHASES = NON_UPDATE_PHASES[2:]
"""Phases that run in smaller pieces if memory is short (`model/oom.py`), so that a plan fits without them."""


@dataclass(frozen=True)
class Phase:
    """A phase at its peak: bytes by purpose, and the place in the model."""

    name: str
    bytes: Mapping[str, int]
    where: str = ""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def static_bytes(self) -> int:
        """Bytes that stay for the whole run."""
        return sum(self.bytes.get(purpose, 0) for purpose in ("weights", "adapters", "optimizer"))


@dataclass(frozen=True)
class OtherBits:
    """What the same recipe needs with another `base.bits`, in bytes that the device must have."""

    bits: int
    needed: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The plan of one stage. `vram` is the GPU's memory in bytes, 0 without a GPU; `notes` are the assumptions."""

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
    other_bits: OtherBits | None = None

    @property
    def peak_phase(self) -> Phase:
        """The phase with the highest peak, of those that are not split."""
        whole_phases = [phase for phase in self.phases if phase not in self.split_phases]
        return max(whole_phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of tensors at the highest peak: a maximum and not a sum, because phases share bytes."""
        return self.peak_phase.total

    @property
    def split_phases(self) -> tuple[Phase, ...]:
        """Phases that run in smaller pieces, because they need more than the GPU's memory at once."""
        split = []
        for phase in self.phases:
            if phase.name in SPLITTABLE_PHASES and 0 < self.vram < needed(phase.total, self.device):
                split.append(phase)
        return tuple(split)

    @property
    def needed(self) -> int:
        """Bytes that the device must have."""
        return needed(self.peak, self.device)

    @property
    def fits(self) -> bool:
        """Whether all phases that cannot be split fit."""
        return not self.vram or self.needed <= self.vram


def needed(peak: int, device: str) -> int:
    """Returns the bytes that a device must have for tensors with `peak` bytes."""
    if device == "cpu":
        return peak
    return CUDA_CONTEXT_BYTES + round(peak / (1 - FRAGMENTATION))
