"""What fits: the largest micro-batch, the longest rows, the fewest layers that must be recomputed; and what to type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from lowrank_tune.assembly import ONLINE_ALGORITHMS
from lowrank_tune.config import RecipeConfig
from lowrank_tune.memory_planner.extrapolation import MIN_LAYERS, fit_linear_model
from lowrank_tune.memory_planner.meta_model import layers_of
from lowrank_tune.memory_planner.plan_report import DECODING_PHASES, GIB, NON_UPDATE_PHASES, Plan, needed
from lowrank_tune.memory_planner.planner import peaks_of, phases_in
from lowrank_tune.memory_planner.simulation import SimulationSpec, simulate
from lowrank_tune.memory_planner.sizes import Sizes, sizes_of

ENOUGH_TOKENS = 8192
"""Of a micro-batch: with more, unpacking 4-bit weights is below 2 % of a step, and fewer recomputed layers are worth
more."""
LENGTH_STEP = 64  # tokens to which a longest row is rounded down
MAX_TRIES = 3


class Search:
    """Asks for the update's peak at other sizes. What the micro-batch does not change (rollouts, above all) the plan
    knows."""

    def __init__(self, spec: SimulationSpec, plan: Plan) -> None:
        self.spec = spec
        self.plan = plan
        self.layers = plan.layers
        self.need = cache(self._need)

    def _need(self, sizes: Sizes, recomputed: int) -> int:
        if sizes == self.plan.sizes and recomputed == self.plan.recomputed:
            return needed(
                max(phase.total for phase in self.plan.phases if phase.name not in NON_UPDATE_PHASES), self.plan.device
            )
        phases = phases_in(peaks_of(replace(self.spec, sizes=sizes), recomputed, only_update=True))
        return needed(max(phase.total for phase in phases), self.plan.device)

    def units(self, max_units: int | None = None) -> int:
        """The largest micro-batch, at most a whole step; 0 for none."""
        max_units = max_units or _step_units(self.spec.recipe)
        return largest_fitting(
            lambda units: self.need(self.with_micro_batch(units), self.plan.recomputed),
            self.plan.sizes.units,
            max_units,
            self.plan.vram,
        )

    def length(self) -> int:
        """The longest rows in this micro-batch, in steps, at most as long as the base knows positions; 0 for none. As
        many tokens at once as fit in more rows fit in longer ones: no kernel keeps scores of all tokens against all."""
        sizes = self.plan.sizes
        longest = int(getattr(self.spec.config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)
        more = _with_length(sizes, min(longest, 2 * sizes.length))
        if more.length <= sizes.length:
            return sizes.length
        now = self.need(sizes, self.plan.recomputed)
        then = self.need(more, self.plan.recomputed)
        slope = max(1.0, (then - now) / (more.length - sizes.length))
        return max(0, min(longest, int(sizes.length + (self.plan.vram - now) / slope)) // LENGTH_STEP * LENGTH_STEP)

    def recomputed(self, sizes: Sizes) -> int | None:
        """The fewest layers that must be recomputed, counted from the first; None where even all are too few."""
        room = self.plan.vram
        spec = replace(self.spec, sizes=sizes)
        if self.need(sizes, self.layers) > room:
            return None
        if self.need(sizes, 0) <= room or self.layers < 2 * MIN_LAYERS:
            if self.need(sizes, 0) <= room:
                return 0
            return self.layers
        kinds = Counter(layers_of(spec.config, 0)) | Counter(layers_of(spec.config, self.layers))
        model = fit_linear_model(lambda layers: simulate(spec, layers, only_update=True), kinds)

        def fits(count: int) -> bool:
            peaks = model.at_depth(Counter(layers_of(spec.config, count)))
            return needed(max(phase.total for phase in phases_in(peaks)), self.plan.device) <= room

        return next((count for count in range(MIN_LAYERS, self.layers - MIN_LAYERS + 1) if fits(count)), self.layers)

    def with_micro_batch(self, units: int) -> Sizes:
        """The recipe's sizes with another micro-batch, of rows as long as they may be."""
        return sizes_of(self.spec.recipe, units)


def largest_fitting(need: Callable[[int], int], start: int, maximum: int, room: int) -> int:
    """The largest n up to `maximum` with need(n) within room; 0 for none. `need` grows by nearly the same with each n,
    so that few are asked."""
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
    """Rows of another length; prompts keep theirs."""
    return replace(sizes, length=length, prompt_length=min(sizes.prompt_length, length - 1))


def _step_units(recipe: RecipeConfig) -> int:
    """Units of an optimizer step, where that is a number."""
    if recipe.algorithm in ONLINE_ALGORITHMS:
        return recipe.train.prompts_per_step * recipe.rollout.num_generations
    return recipe.train.global_batch_size or 16


def with_fit_report(spec: SimulationSpec, plan: Plan) -> Plan:
    """The plan with what fits and one line of advice."""
    if not plan.vram:
        return plan
    search = Search(spec, plan)
    units = search.units()
    length = search.length()
    plan = replace(plan, max_micro_batch_size=units, fits_length=length)
    return replace(plan, advice=_advice(spec, search, plan))


def _advice(spec: SimulationSpec, search: Search, plan: Plan) -> str:
    """What to type, so that it fits, or is faster."""
    recipe = spec.recipe
    sizes = plan.sizes
    if plan.fits:
        if not plan.recomputed:
            return ""
        fewest = search.recomputed(sizes)
        if fewest is None or fewest >= plan.recomputed:
            return ""
        how = "none" if not fewest else str(fewest)
        return (
            f"faster: train.gradient_checkpointing={how} recomputes {fewest or 'no'} "
            f"layer{'' if fewest == 1 else 's'}, and fits"
        )
    if plan.recomputed < plan.layers and (fewest := search.recomputed(sizes)) is not None:
        return f"fits with train.gradient_checkpointing={'all' if fewest == plan.layers else fewest}"
    if plan.max_micro_batch_size:
        return f"fits with {_micro(recipe, sizes, plan.max_micro_batch_size)}"
    return _shorten(spec, plan)


def _micro(recipe: RecipeConfig, sizes: Sizes, units: int) -> str:
    """The recipe's own way to say how large a micro-batch is."""
    if recipe.train.micro_batch_tokens is not None:
        return f"train.micro_batch_tokens={units * sizes.rows_per_unit * recipe.max_train_length}"
    return f"train.micro_batch_size={units}"


def _shorten(spec: SimulationSpec, plan: Plan) -> str:
    """Where even one row is too much."""
    recipe = spec.recipe
    static = sum(plan.peak_phase.bytes.get(purpose, 0) for purpose in ("weights", "adapters", "optimizer"))
    if needed(static, plan.device) > plan.vram:
        return f"the weights alone need {needed(static, plan.device) / GIB:.1f} GiB: a smaller base" + (
            "" if recipe.base.bits == 4 else ", or base.bits=4"
        )
    if plan.peak_phase.name in DECODING_PHASES:
        return (
            "fewer sequences at once: rollout.max_num_seqs, or shorter ones: rollout.max_new_tokens, "
            "evaluate.max_new_tokens"
        )
    online = recipe.algorithm in ONLINE_ALGORITHMS
    alone = (
        (plan.fits_length or 0) * plan.sizes.units // LENGTH_STEP * LENGTH_STEP
    )  # tokens of a row that goes through by itself
    value = alone - (recipe.data.max_prompt_length if online else 0)
    if value >= LENGTH_STEP:
        micro = "train.micro_batch_size=1"
        if recipe.train.micro_batch_tokens is not None:
            micro = f"train.micro_batch_tokens={alone * plan.sizes.rows_per_unit}"
        return f"fits with {'rollout.max_new_tokens' if online else 'data.max_length'}={value} {micro}"
    if not recipe.train.activation_offloading and plan.recomputed:
        return "try train.activation_offloading=true, a smaller rank (adapters.policy.r), or a smaller base"
    return "a smaller rank (adapters.policy.r), or a smaller base"


def choose_micro_batch(spec: SimulationSpec, plan: Plan) -> dict[str, int]:
    """What `auto` stands for: rows of a micro-batch, and layers that are recomputed. With both, no larger a micro-batch
    than speed needs, and then as few layers as fit; nothing where not even one row fits."""
    train = spec.recipe.train
    search = Search(spec, plan)
    choice = dict[str, int]()
    both = train.gradient_checkpointing == "auto"
    sizes = plan.sizes
    if train.micro_batch_size == "auto":
        if both:
            enough = max(1, ENOUGH_TOKENS // (sizes.length * sizes.rows_per_unit))
        else:
            enough = None
        units = search.units(min(_step_units(spec.recipe), enough) if enough else None)
        if not units:
            return choice
        choice["micro_batch_size"] = units
        sizes = search.with_micro_batch(units)
    if both and (fewest := search.recomputed(sizes)) is not None:
        choice["gradient_checkpointing"] = fewest
    return choice
