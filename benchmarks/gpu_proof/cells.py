"""Cells: an algorithm at fixed sizes, with planned and measured memory, and speed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from gpu_proof import measured_run
from gpu_proof.factories import ALGORITHMS, GENERATIVE, PAIRED, TRAINED_ROLES, make_roles
from gpu_proof.machine import release_unused, reserved_gib, reset_peak
from gpu_proof.measured_run import MeasuredRun, mean
from gpu_proof.profiling import Profile
from gpu_proof.records import Record
from gpu_proof.synthetic import STEPS, Size, TrainSettings, full_rows, ragged_rows
from gpu_proof.workload import bytes_per_token, flops
from lowrank_tune.generation.cuda_graphs import NAME as CUDA_GRAPHS
from lowrank_tune.model.activation_checkpointing import Checkpointing, num_checkpointed_layers
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles

PLAN_TOLERANCE = 0.05


@dataclass(frozen=True)
class Cell:
    """`units` of a step, `micro` of them in a micro-batch: rows, pairs, or completions, each row `length` tokens; of
    these, `prompt` are the prompt where completions are generated, `group` of each."""

    algorithm: str
    units: int
    micro: int
    length: int
    prompt: int | None = None
    group: int | None = None
    checkpointing: Checkpointing = "all"
    offload: bool = False
    optimizer: str = "adamw"
    torch_compile: bool = False
    without: tuple[str, ...] = ()
    """Names of the fast paths that are disabled."""
    ragged: bool = False
    """Rows of different lengths, whose second half is trained; else all of full length."""

    @property
    def name(self) -> str:
        extras = [f"recompute {self.checkpointing}"] if self.checkpointing != "all" else []
        extras += ["offloaded"] if self.offload else []
        extras += [self.optimizer] if self.optimizer != "adamw" else []
        extras += ["ragged"] if self.ragged else []
        extras += ["compiled"] if self.torch_compile else []
        extras += [f"without {name}" for name in self.without]
        return " ".join([self.algorithm, f"{self.micro}x{self.length}", *extras])

    @property
    def together(self) -> int:
        return 2 if self.algorithm in PAIRED else 1

    @property
    def size(self) -> Size:
        return Size(self.units * self.together, self.micro * self.together, self.length, self.prompt, self.group)


MAIN = Cell("sft", 8, 4, 2048)
REFERENCE = Cell("sft", 8, 2, 2048)
"""Micro-batch 2 with accumulation 4: what Unsloth and Surogate publish for Qwen3-8B (r 16 on all seven linears)."""
NOT_RECOMPUTED = Cell("sft", 2, 1, 1024, checkpointing="none")
PAGED = Cell("sft", 2, 2, 4096, offload=True, optimizer="paged_adamw_8bit")
REMAINING = (
    Cell("sft", 4, 2, 1024, checkpointing=16),
    Cell("reward", 4, 2, 1024),
    Cell("dpo", 4, 2, 1024),
    Cell("grpo", 16, 8, 384, prompt=256, group=8),
    Cell("ppo", 16, 8, 384, prompt=256, group=8),
)
PACKED_ROWS = "packed rows"
LORA_LINEARS = "LoRA linears as one function"
FAST_PATHS = (
    Cell("sft", 8, 4, 2048, without=(PACKED_ROWS, LORA_LINEARS)),
    Cell("sft", 8, 4, 2048, torch_compile=True),
    Cell("sft", 8, 2, 2048, checkpointing=8, torch_compile=True),
    Cell("sft", 16, 8, 1024, ragged=True),
    Cell("sft", 16, 8, 1024, ragged=True, without=(PACKED_ROWS,)),
    Cell("grpo", 16, 8, 384, prompt=256, group=8, torch_compile=True),
    Cell("grpo", 16, 8, 384, prompt=256, group=8, without=(PACKED_ROWS,)),
    Cell("grpo", 16, 8, 384, prompt=256, group=8, without=(CUDA_GRAPHS,)),
)
"""Cells that differ from another in one thing: the plain paths and compiled layers from MAIN, packing on and off, and a
group with compiled layers, whose prompt is shared with a mask, or that is decoded without graphs, from that of
REMAINING. The third differs in more: it
compares planned and measured memory of compiled layers some of which are recomputed."""
CELLS = (MAIN, NOT_RECOMPUTED, PAGED, *REMAINING)
"""On a GPU of 24 GB, with a base of 7 to 8 billion parameters in NF4."""
PLANNED = (*CELLS, *(cell for cell in FAST_PATHS if cell.torch_compile))

TINY_MAIN = Cell("sft", 4, 2, 48)
TINY_REFERENCE = Cell("sft", 4, 1, 48)
TINY_NOT_RECOMPUTED = Cell("sft", 2, 1, 48, checkpointing="none")
TINY_PAGED = Cell("sft", 2, 2, 64, checkpointing=1, offload=True)
TINY_REMAINING = (
    Cell("reward", 2, 1, 48),
    Cell("dpo", 2, 1, 48),
    Cell("grpo", 4, 2, 24, prompt=16, group=2),
    Cell("ppo", 4, 2, 24, prompt=16, group=2),
)
TINY_FAST_PATHS = (
    Cell("sft", 4, 2, 48, without=(PACKED_ROWS, LORA_LINEARS)),
    Cell("sft", 8, 4, 48, ragged=True),
    Cell("sft", 8, 4, 48, ragged=True, without=(PACKED_ROWS,)),
)
TINY_CELLS = (TINY_MAIN, TINY_NOT_RECOMPUTED, TINY_PAGED, *TINY_REMAINING)


def measure(
    cell: Cell, base: Base, rates: tuple[float, float], planned_gib: float | None = None, profile: bool = False
) -> list[Record]:
    """Return the record of a cell: its settings, planned and measured memory in GiB, tokens per second, shares of
    the device's own rates (TFLOP/s, GB/s); and, with `profile`, the record of one more step's kernels. An error
    becomes `failed`."""
    record: Record = {"kind": "cell", "side": "lowrank_tune", "cell": cell.name, **asdict(cell), "base": base.name}
    record["planned_gib"] = planned_gib
    records = [record]
    trained = TRAINED_ROLES.get(cell.algorithm, ("policy",))
    roles = make_roles(base, trained, cell.checkpointing, offload=cell.offload, torch_compile=cell.torch_compile)
    messages: list[str] = []
    roles.limits.emit = lambda event: messages.append(str(getattr(event, "message", "")))
    for path in roles.fast_paths:
        path.enabled = path.enabled and path.name not in cell.without
    roles.decoding.cuda_graphs = CUDA_GRAPHS not in cell.without
    rows = ragged_rows if cell.ragged else full_rows
    try:
        vocab_size = base.model.config.vocab_size
        make = ALGORITHMS[cell.algorithm]
        algorithm = make(roles, lambda step: rows(cell.size, vocab_size, cell.together), cell.size)
        parameters = [parameter for role in trained for parameter in roles.parameters(role)]
        release_unused(base.device)
        reset_peak(base.device)
        settings = TrainSettings(micro_batch_size=cell.micro, optim=cell.optimizer)
        # The profiled step comes after the timed ones and before the last, which also measures KL.
        steps, profile_step = (STEPS + 1, STEPS - 1) if profile else (STEPS, None)
        run = measured_run.run(algorithm, roles, parameters, settings, steps, profile_step)
        record |= figures(cell, base, roles, run, rates)
        record["fast_paths"] = [path.name for path in roles.fast_paths if path.enabled]
        if base.device.type == "cuda" and roles.decoding.cuda_graphs:
            record["fast_paths"].append(CUDA_GRAPHS)
        record["messages"] = [message for message in messages if message]
        if planned_gib is not None:
            record["plan_holds"] = abs(record["measured_gib"] / planned_gib - 1) <= PLAN_TOLERANCE
        if run.profile is not None:
            records.append(profile_record(cell, base, run.profile, record["seconds_per_step"]))
    except Exception as error:
        record["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        roles.unload_adapters()
    release_unused(base.device)  # outside the handler, whose traceback refers to the tensors
    return records


def figures(cell: Cell, base: Base, roles: Roles, run: MeasuredRun, rates: tuple[float, float]) -> Record:
    """Return what the timed steps took: the two after the first, which measures KL too."""
    timed = slice(1, STEPS - 1)
    trained, layers = TRAINED_ROLES.get(cell.algorithm, ("policy",)), base.model.config.num_hidden_layers
    batch = run.batches[1]
    micro_batches = list(batch.split(cell.size.micro, rows_per_unit=cell.together))
    recomputed = num_checkpointed_layers(cell.checkpointing, layers) / layers
    step_flops = sum(flops(base, roles, role, micro_batches, recomputed) for role in trained)
    seconds, collecting = mean(run.update_seconds[timed]), mean(run.collect_seconds[timed])
    result: Record = {
        "measured_gib": run.peak_gib,
        **{f"{phase}_gib": gib for phase, gib in run.peaks_gib.items()},
        "reserved_gib": reserved_gib(base.device),
        "update_tokens_per_second": int(batch.attention_mask.sum()) / seconds,
        "update_tflops": step_flops / seconds / 1e12,
        "matmul_share": step_flops / seconds / 1e12 / rates[0],
        "seconds_per_step": seconds + collecting,
        "fits": run.out_of_memory == 0,
        "loss_is_finite": all(math.isfinite(event.stats["loss"]) for event in run.events),
    }
    if cell.algorithm in GENERATIVE:
        generating = mean([event.stats["rollout_seconds"] for event in run.events[timed]])
        # Each new token of all sequences together reads the whole base once.
        read = cell.size.max_new_tokens * bytes_per_token(base.model)
        result |= {
            "rollout_tokens_per_second": int(batch.completion_mask.sum()) / generating,
            "rollout_seconds": generating,
            "bandwidth_share": read / generating / 1e9 / rates[1],
        }
    return result


def profile_record(cell: Cell, base: Base, profile: Profile, seconds: float) -> Record:
    """Return the kernels of one update beside the wall time of an update that was not profiled."""
    return {
        "kind": "profile",
        "cell": cell.name,
        "base": base.name,
        "launches": profile.launches,
        "busy_seconds": profile.busy_seconds,
        "wall_seconds": seconds,
        "busy_share": profile.busy_seconds / seconds,
        "host_syncs": profile.host_syncs,
        "sync_places": profile.sync_places,
        "kernels": profile.kernels,
    }
