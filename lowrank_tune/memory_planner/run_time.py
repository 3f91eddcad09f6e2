"""The estimate of a run's time on a GPU: tokens per second of each phase, and hours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lowrank_tune.config import RecipeConfig
from lowrank_tune.generation.decode_steps import COLUMNS_PER_BUCKET
from lowrank_tune.memory_planner.gpu_specs import FASTEST, SLOWEST, GpuSpec
from lowrank_tune.memory_planner.plan_report import DECODING_PHASES, KL_ESTIMATE, PHASE_SEPARATOR
from lowrank_tune.memory_planner.repetitions import num_heldout_rounds, tokens_of_phase, tokens_per_update
from lowrank_tune.memory_planner.rollouts import DecodingSpec
from lowrank_tune.memory_planner.roofline import PhaseTime, phase_time
from lowrank_tune.memory_planner.run_length import RunLength, Span
from lowrank_tune.memory_planner.step_costs import (
    AVERAGE_STEP,
    LONGEST_STEP,
    OLD_AND_REFERENCE,
    OPTIMIZER,
    PLACING,
    READING,
    REFERENCE,
    REWARD_MODEL,
    UPDATE,
    VALIDATION,
    PhaseCost,
)

SECONDS_PER_HOUR = 3600
ROLLOUT, _ = DECODING_PHASES


@dataclass(frozen=True)
class PhaseSpeed:
    """A phase in which `tokens` tokens take `time`. `hours` are those of all its repetitions in a run, None if the
    length of the run is unknown or the phase is a part of another."""

    name: str
    tokens: float
    time: PhaseTime
    hours: Span | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.time.seconds


@dataclass(frozen=True)
class RunTime:
    """The estimated time of a run on a GPU. `hours` are those of the whole run, None if its length is unknown."""

    gpu: GpuSpec
    phases: tuple[PhaseSpeed, ...]
    length: RunLength | None

    @property
    def update(self) -> PhaseSpeed:
        """The update, with its share of the optimizer's step."""
        return next(phase for phase in self.phases if phase.name == UPDATE)

    @property
    def hours(self) -> Span | None:
        if self.length is None:
            return None
        total = Span(0.0, 0.0)
        for phase in self.phases:
            if phase.hours is not None:
                total = total.plus(phase.hours)
        return total

    def update_hours(self, tokens: float) -> Span:
        """Returns the hours in which the update reads so many tokens."""
        return _hours(Span(tokens, tokens).times(1 / self.update.tokens_per_second))


@dataclass(frozen=True)
class RunTimeModel:
    """Computes the time of a recipe's phases on a GPU."""

    recipe: RecipeConfig
    gpu: GpuSpec
    costs: Mapping[str, PhaseCost]
    rollouts: Mapping[str, DecodingSpec]

    def run_time(self, length: RunLength | None) -> RunTime:
        """Returns the estimate for a run of this length."""
        return RunTime(self.gpu, tuple(self._phases(length)), length)

    def _phases(self, length: RunLength | None) -> Iterator[PhaseSpeed]:
        for name, decoding in self.rollouts.items():
            yield self._decoding_speed(name, decoding, length)
            for step in (AVERAGE_STEP, LONGEST_STEP):
                part = name + PHASE_SEPARATOR + step
                yield PhaseSpeed(part, self.costs[part].tokens, self._step_time(part, decoding))
        for name in (OLD_AND_REFERENCE, REWARD_MODEL, REFERENCE, KL_ESTIMATE):
            if name in self.costs:
                yield self._speed(name, self._time_of(name), length)
        yield self._speed(UPDATE, self._update_time(), length)
        if VALIDATION in self.costs and not self.recipe.is_online:
            yield self._speed(VALIDATION, self._time_of(VALIDATION), length)

    def _time_of(self, name: str) -> PhaseTime:
        return phase_time(self.costs[name].kernels, self.gpu)

    def _step_time(
        self,
        name: str,
        decoding: DecodingSpec,
    ) -> PhaseTime:
        """Returns the time of a decoding step."""
        time = self._time_of(name)
        return time.captured() if decoding.cuda_graphs else time

    def _update_time(self) -> PhaseTime:
        """Returns the time of a micro-batch with its share of the optimizer's step."""
        micro_tokens = self.costs[UPDATE].tokens
        share = micro_tokens / tokens_per_update(self.recipe, micro_tokens)
        return self._time_of(UPDATE).then(self._time_of(OPTIMIZER).times(share))

    def _speed(
        self,
        name: str,
        time: PhaseTime,
        length: RunLength | None,
    ) -> PhaseSpeed:
        tokens = self.costs[name].tokens
        hours = None
        if length is not None:
            total = tokens_of_phase(name, self.recipe, length)
            hours = _hours(total.times(time.seconds / tokens))
        return PhaseSpeed(
            name,
            tokens,
            time,
            hours,
        )

    def _decoding_speed(
        self,
        name: str,
        decoding: DecodingSpec,
        length: RunLength | None,
    ) -> PhaseSpeed:
        """Returns the speed of drawing the completions of a step, or of all held-out answers, at their full length."""
        new_tokens = decoding.max_new_tokens
        longest = self._decoding_time(name, decoding, new_tokens)
        hours = None
        if length is not None and name == ROLLOUT:
            shortest = self._decoding_time(name, decoding, length.new_tokens.low)
            hours = _hours(Span(shortest.seconds, longest.seconds).times(length.steps))
        elif length is not None:
            rounds = num_heldout_rounds(self.recipe, length)
            shortest = self._decoding_time(name, decoding, 0.0)
            hours = _hours(Span(shortest.seconds, longest.seconds).times(rounds))
        return PhaseSpeed(
            name,
            decoding.prompts * decoding.samples * new_tokens,
            longest,
            hours,
        )

    def _decoding_time(
        self,
        name: str,
        decoding: DecodingSpec,
        new_tokens: float,
    ) -> PhaseTime:
        """Returns the time of all completions with this number of new tokens. A slot is filled again at once."""
        completions = decoding.prompts * decoding.samples
        turns = max(1.0, completions / decoding.slots)
        reading = self._time_of(name + PHASE_SEPARATOR + READING)
        placing = self._time_of(name + PHASE_SEPARATOR + PLACING)
        part = name + PHASE_SEPARATOR + AVERAGE_STEP
        step = self._step_time(part, decoding)
        prompts = reading.times(decoding.prompts / decoding.prefill_prompts)
        # On the average a completion ends in the middle between two reads, and the tokens after its end are dropped.
        num_dropped = (decoding.sync_every - 1) / 2
        total = prompts.then(placing.times(turns)).then(step.times(turns * (new_tokens + num_dropped)))
        if decoding.cuda_graphs:
            # A kind of step runs plain once, and once more while it is captured.
            total = total.then(self._time_of(part).times(2 * num_step_kinds(decoding.slots, new_tokens)))
        return total


def num_step_kinds(slots: int, new_tokens: float) -> int:
    """Returns of how many numbers of slots and columns a rollout has steps: sequences grow while all slots are in use,
    and at the end fewer and fewer slots are."""
    return math.ceil(new_tokens / COLUMNS_PER_BUCKET) + slots.bit_length()


def sum_of_hours(run_times: Sequence[RunTime]) -> Span | None:
    """Returns the hours of several stages, None if those of one are unknown."""
    total = Span(0.0, 0.0)
    for run_time in run_times:
        if run_time.hours is None:
            return None
        total = total.plus(run_time.hours)
    return total if run_times else None


def _hours(seconds: Span) -> Span:
    """Returns hours with the range of the estimate."""
    return Span(seconds.low * FASTEST / SECONDS_PER_HOUR, seconds.high * SLOWEST / SECONDS_PER_HOUR)
