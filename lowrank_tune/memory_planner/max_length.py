"""The longest row that fits a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_tune.config import RecipeConfig
from lowrank_tune.errors import UserError
from lowrank_tune.memory_planner.plan_report import DECODING_PHASES, Plan, needed
from lowrank_tune.memory_planner.planner import bytes_per_sequence, plan_of, vram_bytes
from lowrank_tune.memory_planner.row_settings import long_row_settings
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.model.base import base_dtype

LENGTH_STEP = 32
"""The longest row is a multiple of this number of tokens, or as long as the base allows."""
MAX_UNLIMITED_LENGTH = 1 << 20
"""Longest row that is tried if the base's configuration names none."""
MAX_ONE_SIDED = 2
"""Guesses in a row on the same side of the limit, after which the interval is halved."""
LoadRecipe = Callable[..., RecipeConfig]
"""Returns the recipe with settings, each an argument as in a command."""


@dataclass(frozen=True)
class RowPlan:
    """The plan of rows of one length, with the settings for long rows."""

    length: int
    settings: tuple[str, ...]
    plan: Plan
    max_positions: int
    """Tokens of the longest row that the base allows, 0 if its configuration does not name it."""
    host_bytes: int
    """Bytes of pinned host memory for the inputs of recomputed layers."""

    @property
    def is_limited_by_base(self) -> bool:
        """Whether the base and not the memory is the reason that no longer row fits."""
        return self.length == self.max_positions


class RowPlanner:
    """Plans rows of any length for a GPU with `vram_gib`. `load` is the recipe without the settings for long rows, and
    `on_try` is called with each length before it is planned."""

    def __init__(
        self,
        load: LoadRecipe,
        vram_gib: float,
        on_try: Callable[[int], None],
    ) -> None:
        self.load = load
        self.on_try = on_try
        self.recipe = load()
        (spec,) = simulation_specs(self.recipe, "cuda")
        self.vram = vram_bytes(spec, vram_gib)
        self.max_positions = int(getattr(spec.config.get_text_config(), "max_position_embeddings", 0) or 0)
        self.shortest = LENGTH_STEP
        if self.recipe.is_online:
            self.shortest += self.recipe.data.max_prompt_length
        self._planned: dict[int, tuple[SimulationSpec, RowPlan]] = {}

    def plan(self, length: int) -> RowPlan:
        """Returns the plan of rows of this length. Raises UserError for a row that the recipe or the base does not
        allow."""
        if length < self.shortest:
            raise UserError(f"--max-length: the shortest row of this recipe has {self.shortest:,} tokens")
        if 0 < self.max_positions < length:
            raise UserError(
                f"--max-length: {self.recipe.base.model} is for rows of at most {self.max_positions:,} tokens"
            )
        return self._plan(length)[1]

    def longest(self) -> RowPlan:
        """Returns the plan of the longest row that fits, or of the shortest row if none fits."""
        length = longest_fitting(
            self._needed,
            self.vram,
            self.shortest,
            self.max_positions or MAX_UNLIMITED_LENGTH,
        )
        return self._plan(length or self.shortest)[1]

    def _plan(self, length: int) -> tuple[SimulationSpec, RowPlan]:
        if length not in self._planned:
            self.on_try(length)
            settings = long_row_settings(self.recipe, length)
            recipe = self.load(*settings)
            (spec,) = simulation_specs(recipe, "cuda")
            plan = plan_of(spec, self.vram, recipe.name)
            dtype = base_dtype(recipe.base, spec.device)
            host_bytes = offloaded_bytes(spec.config, spec.sizes.tokens, plan.recomputed, dtype)
            row_plan = RowPlan(
                length,
                tuple(settings),
                plan,
                self.max_positions,
                host_bytes,
            )
            self._planned[length] = spec, row_plan
        return self._planned[length]

    def _needed(self, length: int) -> int:
        """Returns the bytes that rows of this length need, with one sequence decoded at a time: the number of sequences
        in a plan that fits depends on the memory."""
        spec, row_plan = self._plan(length)
        plan = row_plan.plan
        if not plan.fits:
            return plan.needed
        dtype = base_dtype(spec.recipe.base, spec.device)
        one_sequence = bytes_per_sequence(spec.config, length, dtype)
        totals = []
        for phase in plan.phases:
            if phase.name == "rollout":
                totals.append(phase.total - phase.bytes["KV cache"] + one_sequence)
            elif phase.name not in DECODING_PHASES and phase not in plan.split_phases:
                totals.append(phase.total)
        return min(self.vram, needed(max(totals), plan.device))


def longest_fitting(
    needed_at: Callable[[int], int],
    room: int,
    shortest: int,
    longest: int,
) -> int:
    """Returns the greatest length between `shortest` and `longest` with `needed_at(length) <= room`, in steps of
    `LENGTH_STEP`; 0 for none. `needed_at` is nearly linear, so that a few calls are enough."""
    need_longest = needed_at(longest)
    if need_longest <= room:
        return longest
    need_shortest = needed_at(shortest)
    if need_shortest > room:
        return 0
    low, need_low = shortest, need_shortest
    high, need_high = longest, need_longest
    balance = 0
    while high - low > LENGTH_STEP:
        share = 0.5
        if abs(balance) <= MAX_ONE_SIDED and need_high > need_low:
            share = (room - need_low) / (need_high - need_low)
        guess = int(low + share * (high - low)) // LENGTH_STEP * LENGTH_STEP
        guess = max(guess, low // LENGTH_STEP * LENGTH_STEP + LENGTH_STEP)
        guess = min(guess, (high - 1) // LENGTH_STEP * LENGTH_STEP)
        need = needed_at(guess)
        if need <= room:
            low, need_low = guess, need
            balance = max(balance, 0) + 1
        else:
            high, need_high = guess, need
            balance = min(balance, 0) - 1
    return low


def offloaded_bytes(
    config: Any,
    tokens: int,
    layers: int,
    dtype: torch.dtype,
) -> int:
    """Returns the bytes of pinned host memory for the inputs of `layers` recomputed layers. torch allocates each
    with a power of two bytes (`ATen/core/CachingHostAllocator.h`)."""
    size = dtype.itemsize * tokens * config.get_text_config().hidden_size
    return int(layers * (1 << (size - 1).bit_length()))
