"""The counts of a block of work on the fake GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Totals:
    """What was counted. Waits and copies are by the line of code that makes them."""

    launches: int = 0
    gpu_seconds: float = 0.0
    """The time of all kernels by the planner's constants (`kernel_times.py`)."""
    python_calls: int = 0
    """Calls of Python functions, where they are counted (`python_calls.py`)."""
    launches_by_op: Counter[str] = field(default_factory=Counter)
    bytes_by_kind: Counter[str] = field(default_factory=Counter)
    flops_by_kind: Counter[str] = field(default_factory=Counter)
    host_syncs: Counter[str] = field(default_factory=Counter)
    """The host waits for the GPU: it reads a value or copies a tensor to itself."""
    copies_to_device: Counter[str] = field(default_factory=Counter)
    copies_to_host: Counter[str] = field(default_factory=Counter)

    @property
    def num_host_syncs(self) -> int:
        return self.host_syncs.total()

    @property
    def num_copies(self) -> int:
        return self.copies_to_device.total()

    @property
    def num_bytes(self) -> int:
        return self.bytes_by_kind.total()

    @property
    def flops(self) -> int:
        return self.flops_by_kind.total()

    def to_json(self) -> dict[str, Any]:
        return {
            "launches": self.launches,
            "gpu_seconds": self.gpu_seconds,
            "python_calls": self.python_calls,
            "launches_by_op": dict(self.launches_by_op.most_common()),
            "bytes_by_kind": dict(self.bytes_by_kind),
            "flops_by_kind": dict(self.flops_by_kind),
            "host_syncs": dict(self.host_syncs.most_common()),
            "copies_to_device": dict(self.copies_to_device.most_common()),
            "copies_to_host": dict(self.copies_to_host.most_common()),
        }

    def minus(self, other: Totals) -> Totals:
        """Returns what was counted here and not in `other`, which counted a part of the same work."""
        return Totals(
            self.launches - other.launches,
            self.gpu_seconds - other.gpu_seconds,
            self.python_calls - other.python_calls,
            self.launches_by_op - other.launches_by_op,
            _difference(self.bytes_by_kind, other.bytes_by_kind),
            _difference(self.flops_by_kind, other.flops_by_kind),
            self.host_syncs - other.host_syncs,
            self.copies_to_device - other.copies_to_device,
            self.copies_to_host - other.copies_to_host,
        )


def _difference(left: Counter[str], right: Counter[str]) -> Counter[str]:
    return Counter({kind: count - right[kind] for kind, count in left.items()})
