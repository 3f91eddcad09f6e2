"""The time of the update with any number of recomputed layers, by the roofline: linear in the layers of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lowrank_tune.memory_planner.cached_simulation import cached_kernels
from lowrank_tune.memory_planner.extrapolation import MIN_LAYERS, with_num_layers
from lowrank_tune.memory_planner.gpu_specs import DEFAULT_GPU, GpuSpec
from lowrank_tune.memory_planner.meta_model import Layer, layers_of
from lowrank_tune.memory_planner.planned_gpu import gpu_named
from lowrank_tune.memory_planner.roofline import PhaseTime, phase_time
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.memory_planner.step_costs import update_kernels


@dataclass(frozen=True)
class UpdateTimes:
    """Times of a micro-batch of `tokens` tokens: with `MIN_LAYERS` layers of each kind, and of one more layer."""

    base: PhaseTime
    extra: Mapping[Layer, PhaseTime]
    tokens: int

    def seconds_per_token(self, layers: Mapping[Layer, int]) -> float:
        """Returns the time with these numbers of layers of each kind."""
        total = self.base
        for kind, extra in self.extra.items():
            total = total.then(extra.times(layers.get(kind, 0) - MIN_LAYERS))
        return max(total.gpu_seconds, total.host_seconds) / self.tokens


def fit_update_times(spec: SimulationSpec, gpu: GpuSpec | None) -> UpdateTimes:
    """Counts the kernels of the first few layers of each kind, recomputed and not, and then of one more of each. The
    rates are those of the default GPU if those of the GPU are unknown."""
    gpu = gpu or gpu_named(DEFAULT_GPU)
    num_layers = spec.config.get_text_config().num_hidden_layers
    kinds = dict.fromkeys((*layers_of(spec.config, num_layers), *layers_of(spec.config, 0)), MIN_LAYERS)
    base = _time(spec, kinds, gpu)
    extra = {}
    for kind in kinds:
        more = _time(spec, {**kinds, kind: MIN_LAYERS + 1}, gpu)
        extra[kind] = more.then(base.times(-1))
    return UpdateTimes(base, extra, spec.sizes.tokens)


def seconds_with(times: UpdateTimes, spec: SimulationSpec, recomputed: int) -> float:
    """Returns the seconds per token if the first `recomputed` layers are recomputed."""
    return times.seconds_per_token(Counter(layers_of(spec.config, recomputed)))


def _time(spec: SimulationSpec, kinds: Mapping[Layer, int], gpu: GpuSpec) -> PhaseTime:
    counts = cached_kernels(spec, with_num_layers(kinds), only_update=True)
    return phase_time(update_kernels(spec, counts), gpu)
