"""The parts of the proof, ordered by information per second. Each yields records, so that what it measured before an
error is kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_proof import cells, decode, decode_equality, facts, machine, memory_modes, oom, plans, product, trl_baseline
from gpu_proof.base import TINY as TINY_SHAPE
from gpu_proof.base import random_base
from gpu_proof.cells import Cell
from gpu_proof.checks import check_algorithm
from gpu_proof.records import Record
from gpu_proof.synthetic import Size
from lowrank_tune.model.base import Base, pick_device

REFERENCE_SHAPE = "qwen3-8b"
OPTIMIZERS = ("adamw", "adamw_8bit")
PAGED_OPTIMIZERS = ("paged_adamw", "paged_adamw_8bit")


class NoGpu(Exception):
    """There is no CUDA device, and `--tiny` was not given."""


@dataclass
class Context:
    """What the parts of one process share: the device, its measured rates, and the base, which is built when a part
    first needs it."""

    tiny: bool
    bf16: bool
    shape: str
    cap_gb: float
    plans_path: Path | None = None
    device: torch.device = field(init=False)
    cap_gib: float | None = field(init=False)
    rates: tuple[float, float] = field(init=False)
    """TFLOP/s of a plain matrix product, GB/s of a copy."""
    machine: Record = field(init=False)
    base_record: Record | None = None
    _base: Base | None = None

    def __post_init__(self) -> None:
        self.device = torch.device("cpu") if self.tiny else pick_device()
        if self.device.type == "cpu" and not self.tiny:
            raise NoGpu
        if self.tiny:
            torch.set_num_threads(1)  # two threads over such small matrices mostly wait for each other
            self.shape = TINY_SHAPE
        self.cap_gib = machine.cap_memory(self.device, self.cap_gb)
        described = machine.describe(self.device, self.cap_gib)
        self.machine = {"kind": "machine", "shape": self.shape, **described}
        self.rates = (described["matmul_tflops"], described["bandwidth_gbs"])

    @property
    def has_base(self) -> bool:
        return self._base is not None

    def base(self) -> Base:
        """Return the shared base. The first call builds it and sets `base_record`."""
        if self._base is None:
            self._base, self.base_record = self.build(self.shape)
        return self._base

    def drop_base(self) -> None:
        """Free the shared base, so that another shape is measured alone. `base` then builds it again."""
        self._base = None
        machine.release_unused(self.device)

    def build(self, shape: str) -> tuple[Base, Record]:
        """Build a base and return it with the seconds and the peak memory that this took."""
        machine.release_unused(self.device)
        machine.reset_peak(self.device)
        start = time.perf_counter()
        base = random_base(shape, self.device, self.bf16)
        machine.synchronize(self.device)
        seconds, peak = time.perf_counter() - start, machine.peak_gib(self.device)
        return base, {"kind": "base", "shape": shape, "build_seconds": seconds, "build_peak_gib": peak}

    @property
    def size(self) -> Size:
        """Rows and lengths of the checks."""
        return Size(4, 2, 48) if self.tiny else Size(8, 4, 1024)

    def planned_gib(self, shape: str, cell: Cell) -> float | None:
        return plans.read_plans(self.plans_path, shape).get(cell.name)

    def cell(self, cell: Cell, profile: bool = False) -> list[Record]:
        base = self.base()
        return cells.measure(cell, base, self.rates, self.planned_gib(self.shape, cell), profile)

    def checks(self, algorithm: str, checkpointing: bool = True) -> Record:
        # Where activations are kept, a pair at most is in a micro-batch.
        size = self.size if checkpointing else replace(self.size, micro=min(self.size.micro, 2))
        result = check_algorithm(algorithm, self.base(), size, checkpointing)
        figures = result.figures
        if "update_tflops" in figures:
            figures["matmul_share"] = figures["update_tflops"] / self.rates[0]
        if self.cap_gib is not None and "peak_gib" in figures:
            result.checks["peak is under the cap"] = figures["peak_gib"] <= self.cap_gib
        return result.record()


@dataclass(frozen=True)
class Part:
    """A part of the proof. It is started only where `limit_s` seconds are left, and stopped after them."""

    name: str
    run: Callable[[Context], Iterator[Record]]
    limit_s: float
    tiny_limit_s: float
    needs_base: bool = True
    isolated: bool = False
    """It runs in a process of its own."""
    description: str = ""

    def limit(self, tiny: bool) -> float:
        return self.tiny_limit_s if tiny else self.limit_s


def run_facts(context: Context) -> Iterator[Record]:
    sizes = facts.TINY if context.tiny else facts.FactSizes()
    for name, measure in facts.FACTS.items():
        yield guarded(name, partial(measure, context.device, sizes))
    size = replace(context.size, rows=4)
    yield guarded("policy_equals_reference", partial(policy_equals_reference, context, size))
    # Last, because it calls a private kernel with more rows than its library does.
    yield guarded("gemm_4bit", partial(facts.gemm_4bit, context.device, sizes))


def policy_equals_reference(context: Context, size: Size) -> Record:
    return facts.policy_equals_reference(context.base(), size)


def guarded(name: str, measure: Callable[[], Record]) -> Record:
    """Return the record of a fact, with the error as `failed` where it cannot be measured."""
    record: Record = {"kind": "fact", "fact": name}
    try:
        return record | measure()
    except Exception as error:
        return record | {"failed": f"{type(error).__name__}: {error}"}


def run_sft(context: Context) -> Iterator[Record]:
    yield from context.cell(cells.TINY_MAIN if context.tiny else cells.MAIN, profile=True)


def run_decode(context: Context) -> Iterator[Record]:
    size = decode.TINY if context.tiny else decode.DecodeSize()
    equality_size = decode_equality.TINY if context.tiny else decode_equality.EqualitySize()
    yield decode_equality.compare(context.base(), equality_size)
    yield from decode.measure(context.base(), size, context.rates[1])


def run_oom(context: Context) -> Iterator[Record]:
    yield oom.check_recovery(context.base(), context.size, context.cap_gib).record()


def checks_of(algorithm: str) -> Callable[[Context], Iterator[Record]]:
    def run(context: Context) -> Iterator[Record]:
        yield context.checks(algorithm)

    return run


def run_product(context: Context) -> Iterator[Record]:
    with tempfile.TemporaryDirectory() as folder:
        yield from product.measure(Path(folder), product.TINY if context.tiny else product.GPU)


def run_reference(context: Context) -> Iterator[Record]:
    cell = cells.TINY_REFERENCE if context.tiny else cells.REFERENCE
    shape = TINY_SHAPE if context.tiny else REFERENCE_SHAPE
    context.drop_base()
    base, built = context.build(shape)
    yield built
    yield from cells.measure(cell, base, context.rates, context.planned_gib(shape, cell), profile=True)


def run_cells(context: Context) -> Iterator[Record]:
    for cell in cells.TINY_REMAINING if context.tiny else cells.REMAINING:
        yield from context.cell(cell)


def run_fast_paths(context: Context) -> Iterator[Record]:
    for cell in cells.TINY_FAST_PATHS if context.tiny else cells.FAST_PATHS:
        yield from context.cell(cell)


def run_trl(context: Context) -> Iterator[Record]:
    """TRL leaves its adapter in the base, so each cell has a base of its own."""
    if missing := trl_baseline.missing_packages():
        yield {"kind": "skipped", "reason": f"{' and '.join(missing)} not installed"}
        return
    measured = cells.TINY_CELLS if context.tiny else cells.CELLS
    for algorithm in trl_baseline.TRAINERS:
        cell = next(cell for cell in measured if cell.algorithm == algorithm)
        base, _ = context.build(context.shape)
        yield trl_baseline.measure(cell, base)
        del base


def run_not_recomputed(context: Context) -> Iterator[Record]:
    yield from context.cell(cells.TINY_NOT_RECOMPUTED if context.tiny else cells.NOT_RECOMPUTED)
    for algorithm in ("sft", "grpo"):
        yield context.checks(algorithm, checkpointing=False)


def run_paged(context: Context) -> Iterator[Record]:
    """Paged optimizers use managed memory, which can hang a GPU."""
    yield from context.cell(cells.TINY_PAGED if context.tiny else cells.PAGED)
    yield memory_modes.check_optimizers(context.base(), PAGED_OPTIMIZERS).record()


def run_rest(context: Context) -> Iterator[Record]:
    yield guarded("torch_compile", partial(facts.torch_compile, context.device))
    yield context.checks("sft")
    yield memory_modes.check_memory_modes(context.base(), context.size).record()
    yield memory_modes.check_optimizers(context.base(), OPTIMIZERS).record()


PARTS = (
    Part("facts", run_facts, 35, 20, description="versions, kernels, 4-bit products, attention, policy == reference"),
    Part("sft", run_sft, 50, 20, description="one cell: speed, planned and measured memory, kernels, synchronizations"),
    Part("decode", run_decode, 65, 30, description="a step at batch 1, 8, 16, 64, single steps and CUDA graphs"),
    Part("oom", run_oom, 45, 20, description="recovery from too little memory, with the same gradient"),
    Part("grpo", checks_of("grpo"), 60, 25),
    Part("ppo", checks_of("ppo"), 60, 25),
    Part("dpo", checks_of("dpo"), 45, 25, description="with prefix sharing on and off"),
    Part("reward", checks_of("reward"), 45, 25),
    Part(
        "product",
        run_product,
        90,
        150,
        needs_base=False,
        isolated=True,
        description="run, interrupt and resume, chat, merge",
    ),
    Part(
        "reference",
        run_reference,
        75,
        20,
        needs_base=False,
        description="Qwen3-8B in the configuration of the numbers that Unsloth and Surogate publish",
    ),
    Part("cells", run_cells, 120, 40, description="memory and speed of the remaining cells"),
    Part(
        "fast_paths",
        run_fast_paths,
        240,
        40,
        isolated=True,
        description="compiled layers, packed rows, LoRA linears and CUDA graphs on and off",
    ),
    Part("trl", run_trl, 130, 90, needs_base=False, isolated=True, description="TRL's SFT, GRPO and DPO, same cells"),
    Part("no_recompute", run_not_recomputed, 60, 40, description="activations kept instead of recomputed"),
    Part("paged", run_paged, 90, 30, isolated=True, description="paged optimizers"),
    Part("rest", run_rest, 75, 40, description="torch.compile, SFT's checks, ways to save memory, optimizers"),
)
BY_NAME: dict[str, Part] = {part.name: part for part in PARTS}


def select(names: str) -> list[Part]:
    """Return the parts named in a comma-separated list, in the order of the proof. Raises ValueError for unknown
    names."""
    requested = [name.strip() for name in names.split(",") if name.strip()]
    unknown = sorted(set(requested) - BY_NAME.keys())
    if unknown or not requested:
        raise ValueError(f"no part {', '.join(unknown) or 'is named'}; the parts are {', '.join(BY_NAME)}")
    return [part for part in PARTS if part.name in requested]


def passed(record: dict[str, Any]) -> bool:
    """Return whether a record contains neither an error nor a check that failed."""
    checks = [record.get(name, True) for name in ("plan_holds", "fits", "loss_is_finite")]
    checks += record.get("checks", {}).values()
    return "failed" not in record and record.get("kind") != "failed" and all(checks)
