"""All that an algorithm may touch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Batch


@dataclass(frozen=True)
class AlgorithmContext:
    """The roles, and `get_batch(step)`: the training rows of an optimizer step, padded, on the CPU.

    `reference_description` says in words what the policy is compared with. `fresh`: the trained adapter began at zero,
    so that before the first step the policy *is* its reference; one that was continued from an earlier run is not.
    """

    roles: Roles
    get_batch: Callable[[int], Batch]
    reference_description: str = "the base, adapters off"
    fresh: bool = True
