"""Decoding without an algorithm around it: milliseconds, launches and host synchronizations of one step, by batch size:
one step at a time, and several between two reads, as CUDA graphs where there is a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from gpu_proof.factories import make_roles
from gpu_proof.machine import synchronize
from gpu_proof.profiling import Profile, profiled
from gpu_proof.records import Record
from gpu_proof.workload import bytes_per_token
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.base import Base

BATCHES = (1, 8, 16, 64)
MODES = {"single steps": False, "graphs": True}
"""Name -> whether the engine has buffers on the device."""
STEP_KERNELS = 8
"""Kernels recorded for each batch size: those with the most time over the profiled steps."""


@dataclass(frozen=True)
class DecodeSize:
    """Tokens of the prompt, and new tokens of the calls whose difference is measured."""

    prompt: int = 720
    short: int = 8
    long: int = 32
    profiled_steps: int = 16
    """A multiple of the steps between two reads of the host."""


TINY = DecodeSize(prompt=40, short=4, long=12, profiled_steps=8)


@dataclass(frozen=True)
class Decoding:
    """`batch` completions of one prompt, which the engine reads once."""

    base: Base
    engine: Engine
    prompt: list[int]
    batch: int

    def seconds(self, new_tokens: int) -> float:
        """Return the wall time of one call of the engine. No completion ends early."""
        synchronize(self.base.device)
        start = time.perf_counter()
        completions = list(self.engine.generate([self.prompt], self.batch, SamplingParams(new_tokens, frozenset())))
        synchronize(self.base.device)
        seconds = time.perf_counter() - start
        assert sum(len(completion.token_ids) for completion in completions) == self.batch * new_tokens
        return seconds

    def profile(self, new_tokens: int) -> Profile:
        with profiled(self.base.device) as result:
            self.seconds(new_tokens)
        return result


def measure(base: Base, size: DecodeSize, bandwidth_gbs: float) -> Iterator[Record]:
    """Yield a record for each batch size and mode. A step is the difference of two calls of the engine, so reading the
    prompt and capturing graphs are not in it. `launches_per_step` counts the kernels in graphs too."""
    roles = make_roles(base, ("policy",), True)
    vocab_size = base.model.config.vocab_size
    prompt = [3 + token % (vocab_size - 3) for token in range(size.prompt)]
    for batch in BATCHES:
        for mode, buffered in MODES.items():
            engine = Engine(roles, "policy", slots=batch)
            engine.buffered = buffered
            decoding = Decoding(base, engine, prompt, batch)
            yield {"kind": "decode", "mode": mode, **measure_steps(decoding, size, bandwidth_gbs)}
    roles.unload_adapters()


def measure_steps(decoding: Decoding, size: DecodeSize, bandwidth_gbs: float) -> Record:
    base = decoding.base
    num_replays = decoding.engine.roles.decoding.num_replays
    decoding.seconds(size.short)  # warms up
    short, long = decoding.seconds(size.short), decoding.seconds(size.long)
    seconds = (long - short) / (size.long - size.short)
    num_steps = size.profiled_steps
    # The first token is not drawn by a step.
    first, last = decoding.profile(1 + num_steps), decoding.profile(1 + 2 * num_steps)
    return {
        "base": base.name,
        "batch": decoding.batch,
        "width": size.prompt + size.long,
        "replayed_steps": decoding.engine.roles.decoding.num_replays - num_replays,
        "wall_ms_per_step": 1e3 * seconds,
        "busy_ms_per_step": 1e3 * (last.busy_seconds - first.busy_seconds) / num_steps,
        "launches_per_step": (last.launches - first.launches) / num_steps,
        "host_syncs_per_step": (last.host_syncs - first.host_syncs) / num_steps,
        "sync_places": last.sync_places,
        "kernels": last.kernels[:STEP_KERNELS],
        "tokens_per_second": decoding.batch / seconds,
        "bandwidth_share": bytes_per_token(base.model) / seconds / 1e9 / bandwidth_gbs,
    }
