"""All that an algorithm may touch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Batch


@dataclass(frozen=True)
class Kit:
    """The roles, and `rows(step)`: the training rows of an optimizer step, padded, on the CPU."""

    roles: Roles
    rows: Callable[[int], Batch]
