"""Finds what fits a GPU: the largest micro-batch, the longest rows, the fewest recomputed layers, and advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

from lowrank_tune.config import RecipeConfig
from lowrank_tune.memory_planner.cached_simulation import cached_peaks
from lowrank_tune.memory_planner.extrapolation import MIN_LAYERS, fit_linear_model
from lowrank_tune.memory_planner.meta_model import layers_of
from lowrank_tune.memory_planner.plan_report import GIB, NON_UPDATE_PHASES, Phase, Plan, needed
from lowrank_tune.memory_planner.planner import peaks_of, phases_in
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.memory_planner.sizes import Sizes, sizes_of, step_units

ENOUGH_TOKENS = 8192
"""Tokens of a micro-batch above which unpacking 4-bit weights takes less than 2 % of a step, so that fewer recomputed
layers save more time."""
LENGTH_STEP = 64
"""The longest row is rounded down to a multiple of this number of tokens."""
MAX_TRIES = 6
"""Guesses of `largest_fitting`: each but the last did not fit."""
DECODING_SETTINGS = {"rollout": "rollout.max_new_tokens", "held-out answers": "evaluate.max_new_tokens"}
"""The settings of the longest completions, by phase."""
DEFAULT_STEP_UNITS = 16
"""Units of an optimizer step if the recipe does not set them."""


class Search:
    """Computes the peak of the update at other sizes. Phases that do not use the micro-batch are as in the plan."""

    def __init__(
        self,
        spec: SimulationSpec,
        plan: Plan,
    ) -> None:
        self.spec = spec
        self.plan = plan
        self.layers = plan.layers
        self.need = cache(self._need)

    def _need(
        self,
        sizes: Sizes,
        recomputed: int,
    ) -> int:
        """Returns the bytes that the device must have for the update."""
        if sizes == self.plan.sizes and recomputed == self.plan.recomputed:
            phases = [phase for phase in self.plan.phases if phase.name not in NON_UPDATE_PHASES]
            return self._bytes_for(phases)
        peaks = peaks_of(
            replace(self.spec, sizes=sizes),
            recomputed,
            only_update=True,
        )
        return self._bytes_for(phases_in(peaks))

    def _bytes_for(self, phases: Iterable[Phase]) -> int:
        return needed(max(phase.total for phase in phases), self.plan.device)

    def units(self, max_units: int | None = None) -> int:
        """Returns the largest micro-batch that fits, at most a whole step; 0 if none fits."""
        return largest_fitting(
            lambda units: self.need(self.with_micro_batch(units), self.plan.recomputed),
            self.plan.sizes.units,
            max_units or step_units(self.spec.recipe, DEFAULT_STEP_UNITS),
            self.plan.vram,
        )

    def length(self) -> int:
        """Returns the longest rows that fit in this micro-batch, at most the base's `max_position_embeddings`; 0 if
        none fit. Bytes grow linearly with the length, because no kernel stores the scores of all pairs of tokens."""
        sizes = self.plan.sizes
        max_length = int(getattr(self.spec.config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)
        longer = _with_length(sizes, min(max_length, 2 * sizes.length))
        if longer.length <= sizes.length:
            return sizes.length
        need = self.need(sizes, self.plan.recomputed)
        need_longer = self.need(longer, self.plan.recomputed)
        bytes_per_token = max(1.0, (need_longer - need) / (longer.length - sizes.length))
        length = min(max_length, int(sizes.length + (self.plan.vram - need) / bytes_per_token))
        return max(0, length // LENGTH_STEP * LENGTH_STEP)

    def single_row(self) -> int:
        """Returns the longest row that fits in a micro-batch of its own, at most that of the recipe; 0 if none fits.
        `length` is not exact enough: of shorter rows, another phase may need most."""
        one = self.with_micro_batch(1)
        steps = largest_fitting(
            lambda steps: self.need(_with_length(one, steps * LENGTH_STEP), self.plan.recomputed),
            self.length() * self.plan.sizes.units // LENGTH_STEP,
            max(1, one.length // LENGTH_STEP),
            self.plan.vram,
        )
        return steps * LENGTH_STEP

    def recomputed(self, sizes: Sizes) -> int | None:
        """Returns the fewest layers, counted from the first, that must be recomputed; None if the update does not fit
        with all recomputed."""
        room = self.plan.vram
        if self.need(sizes, self.layers) > room:
            return None
        if self.need(sizes, 0) <= room:
            return 0
        if self.layers < 2 * MIN_LAYERS:
            return self.layers
        spec = replace(self.spec, sizes=sizes)
        kinds = Counter(layers_of(spec.config, 0)) | Counter(layers_of(spec.config, self.layers))
        model = fit_linear_model(lambda layers: cached_peaks(spec, layers, only_update=True), kinds)
        for count in range(MIN_LAYERS, self.layers - MIN_LAYERS + 1):
            peaks = model.at_depth(Counter(layers_of(spec.config, count)))
            if self._bytes_for(phases_in(peaks)) <= room:
                return count
        return self.layers

    def with_micro_batch(self, units: int) -> Sizes:
        """Returns the recipe's sizes with another micro-batch, of the longest rows."""
        return sizes_of(self.spec.recipe, units)


def largest_fitting(
    need: Callable[[int], int],
    start: int,
    maximum: int,
    room: int,
) -> int:
    """Returns the largest n up to `maximum` with need(n) <= room; 0 for none. `need` is nearly linear, so that it is
    called only a few times."""
    start = max(1, min(start, maximum))
    now = need(start)
    low = start if now <= room else 0
    other = min(maximum, 2 * start) if now <= room else max(1, start // 2)
    if other == start:
        return low
    then = need(other)
    low = max(low, other if then <= room else 0)
    slope = max(1.0, (then - now) / (other - start))
    tried = {start, other}
    guess = int(start + (room - now) / slope)
    for _ in range(MAX_TRIES):
        guess = min(maximum, max(1, guess))
        if guess in tried or guess <= low:
            break
        tried.add(guess)
        needed_bytes = need(guess)
        if needed_bytes <= room:
            return guess
        guess = min(guess - 1, int(guess - (needed_bytes - room) / slope))
    return low


def _with_length(sizes: Sizes, length: int) -> Sizes:
    """Returns sizes with rows of another length, and prompts of the same."""
    return replace(
        sizes,
        length=length,
        prompt_length=min(sizes.prompt_length, length - 1),
    )


def with_fit_report(spec: SimulationSpec, plan: Plan) -> Plan:
    """Adds to the plan what fits, and one line of advice."""
    if not plan.vram:
        return plan
    search = Search(spec, plan)
    plan = replace(
        plan,
        max_micro_batch_size=search.units(),
        fits_length=search.length(),
    )
    return replace(plan, advice=_advice(spec, search, plan))


def _advice(
    spec: SimulationSpec,
    search: Search,
    plan: Plan,
) -> str:
    """Returns the settings with which the recipe fits, or is faster."""
    recipe = spec.recipe
    sizes = plan.sizes
    if plan.fits:
        if not plan.recomputed or recipe.train.gradient_checkpointing == "auto":
            return ""
        fewest = search.recomputed(sizes)
        if fewest is None or fewest >= plan.recomputed:
            return ""
        if not fewest:
            return "faster: train.gradient_checkpointing=none recomputes no layers, and fits"
        layers = "layer" if fewest == 1 else "layers"
        return f"faster: train.gradient_checkpointing={fewest} recomputes {fewest} {layers}, and fits"
    # The settings of the update below do not change the phases that decode.
    shorter = _shorter_sequences(plan)
    update_may_fit = plan.max_micro_batch_size or plan.recomputed < plan.layers
    if shorter and (update_may_fit or plan.peak_phase.name in DECODING_SETTINGS):
        return f"one sequence at a time does not fit: a smaller {' or '.join(shorter)}"
    if plan.recomputed < plan.layers:
        fewest = search.recomputed(sizes)
        if fewest == plan.layers:
            return "fits with train.gradient_checkpointing=all"
        if fewest is not None:
            return f"fits with train.gradient_checkpointing={fewest}"
    if plan.max_micro_batch_size:
        tokens = plan.max_micro_batch_size * sizes.rows_per_unit * recipe.max_train_length
        return f"fits with {_micro_batch_setting(recipe, plan.max_micro_batch_size, tokens)}"
    return _shorten(spec, search, plan)


def _shorter_sequences(plan: Plan) -> list[str]:
    """Returns the settings that shorten sequences which do not fit while they are decoded. Micro-batches have no effect
    on these phases, and they are planned with as few sequences at once as needed. Empty if the weights alone do not
    fit."""
    settings = []
    for phase in plan.phases:
        fits_alone = needed(phase.static_bytes, plan.device) <= plan.vram
        if phase.name in DECODING_SETTINGS and fits_alone and needed(phase.total, plan.device) > plan.vram:
            settings.append(DECODING_SETTINGS[phase.name])
    if settings:
        settings.append("data.max_prompt_length")
    return settings


def _micro_batch_setting(
    recipe: RecipeConfig,
    units: int,
    tokens: int,
) -> str:
    """Returns the setting of a micro-batch, in units or in tokens as in the recipe."""
    if recipe.train.micro_batch_tokens is not None:
        return f"train.micro_batch_tokens={tokens}"
    return f"train.micro_batch_size={units}"


def _shorten(
    spec: SimulationSpec,
    search: Search,
    plan: Plan,
) -> str:
    """Returns advice if one row does not fit."""
    recipe = spec.recipe
    static = needed(plan.peak_phase.static_bytes, plan.device)
    if static > plan.vram:
        advice = f"the weights alone need {static / GIB:.1f} GiB: a smaller base"
        if recipe.base.bits != 4:
            advice += ", or base.bits=4"
        return advice
    row_tokens = search.single_row()
    setting = "data.max_length"
    value = row_tokens
    if recipe.is_online:
        setting = "rollout.max_new_tokens"
        value -= recipe.data.max_prompt_length
    if value >= LENGTH_STEP:
        micro = _micro_batch_setting(recipe, 1, row_tokens * plan.sizes.rows_per_unit)
        return f"fits with {setting}={value} {micro}"
    if not recipe.train.activation_offloading and plan.recomputed:
        return "try train.activation_offloading=true, a smaller rank (adapters.policy.r), or a smaller base"
    return "a smaller rank (adapters.policy.r), or a smaller base"
