"""Small programs on the fake GPU whose counts can be worked out by hand, and planted faults that must be found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from argument_checks import MismatchError
from fake_base import fake_base
from fake_workloads import count_micro_batch, count_step, micro_batch_algorithm, sft_rows, stacked_roles
from integer_values import UnknownValues
from kernel_counter import CUDA, KernelCounter
from kernel_totals import Totals
from torch import Tensor

from lowrank_tune.algorithms.base import Algorithm
from lowrank_tune.batch import Batch

HALF = torch.bfloat16


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=CUDA)


def run_checks(counter: KernelCounter) -> dict[str, Any]:
    """Returns the result of each check by its name."""
    counted = {name: count(counter, program) for name, program in PROGRAMS.items()}
    refused = {name: refusal(program) for name, program in FAULTS.items()}
    return {
        "counted": counted,
        "refused": refused,
        "values": [check() for check in VALUE_CHECKS],
        "planted": planted_reads(counter),
        "step": step_flops(counter),
    }


def count(counter: KernelCounter, program: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    """Returns what the function that `program` returns does; its tensors are made before."""
    function = program()
    with counter.counting() as totals:
        function()
    return summary(totals)


def summary(totals: Totals) -> dict[str, Any]:
    return {
        "launches": totals.launches,
        "bytes": totals.num_bytes,
        "flops": totals.flops,
        "host_syncs": totals.num_host_syncs,
        "copies": totals.num_copies,
        "places": sorted({*totals.host_syncs, *totals.copies_to_device}),
    }


def refusal(program: Callable[[], Any]) -> str:
    """Returns the name of the error that a faulty program raises, or an empty text."""
    try:
        program()
    except (MismatchError, UnknownValues) as error:
        return type(error).__name__
    return ""


def product() -> Callable[[], Any]:
    left = zeros(3, 5, dtype=HALF)
    right = zeros(5, 7, dtype=HALF)
    return lambda: left @ right


def add_expanded() -> Callable[[], Any]:
    row = zeros(1, 8).expand(4, 8)
    rows = zeros(4, 8)
    return lambda: row + rows


def views() -> Callable[[], Any]:
    x = zeros(4, 8)
    return lambda: x.view(2, 2, 8).transpose(0, 1)[:, 1:].unsqueeze(0).detach()


def gather_rows() -> Callable[[], Any]:
    table = zeros(1000, 8)
    rows = torch.tensor([3, 5], device=CUDA)
    return lambda: table[rows]


def packed_weight(width: int, columns: int) -> tuple[Any, ...]:
    """Returns what follows the input in a call of bitsandbytes' product with a packed weight (width, columns)."""
    blocks = width * columns // 64
    packed = zeros(width * columns // 2, 1, dtype=torch.uint8)
    return packed, [width, columns], zeros(blocks // 256), 64, "nf4"


def gemm_4bit(rows: int) -> Callable[[], Callable[[], Any]]:
    def program() -> Callable[[], Any]:
        x = zeros(rows, 4096, dtype=HALF)
        weight = packed_weight(4096, 4096)
        scales = {
            "absmax_8bit": zeros(4096 * 64, dtype=torch.uint8),
            "absmax_code": zeros(256),
            "absmax_offset": zeros(),
        }
        return lambda: torch.ops.bitsandbytes.gemm_4bit.default(x, *weight, **scales)

    return program


def attention(masked: bool) -> Callable[[], Callable[[], Any]]:
    def program() -> Callable[[], Any]:
        x = zeros(1, 2, 16, 8, dtype=HALF)
        mask = zeros(1, 1, 16, 16, dtype=HALF) if masked else None
        return lambda: F.scaled_dot_product_attention(x, x, x, mask, is_causal=not masked)

    return program


def reads(method: str) -> Callable[[], Callable[[], Any]]:
    """Returns a program that calls a method of a tensor, from a line of the kit."""

    def program() -> Callable[[], Any]:
        batch = Batch(*(torch.ones(1, 1, dtype=torch.bool, device=CUDA) for _ in range(3)))

        def read(tensor: Tensor) -> Tensor:
            if tensor is batch.input_ids:
                getattr(tensor, method)()
            return tensor

        return lambda: batch.map_tensors(read)

    return program


def mask_index() -> Callable[[], Any]:
    x = zeros(4, 8)
    mask = torch.tensor([True, False, True, False], device=CUDA)
    return lambda: x[mask]


def compared() -> Callable[[], Any]:
    x = zeros(4)
    return lambda: torch.equal(x, x)


def copied() -> Callable[[], Any]:
    return lambda: torch.zeros(4).to(CUDA)


PROGRAMS: dict[str, Callable[[], Callable[[], Any]]] = {
    "product": product,
    "add_expanded": add_expanded,
    "views": views,
    "gather_rows": gather_rows,
    "gemm_4bit of 1 row": gemm_4bit(1),
    "gemm_4bit of 2048 rows": gemm_4bit(2048),
    "flash attention": attention(masked=False),
    "attention with a mask": attention(masked=True),
    "item": reads("item"),
    "tolist": reads("tolist"),
    "bool": reads("__bool__"),
    "nonzero": reads("nonzero"),
    "cpu": reads("cpu"),
    "mask_index": mask_index,
    "equal": compared,
    "to the device": copied,
}


def two_dtypes() -> Any:
    return zeros(3, 5, dtype=HALF) @ zeros(5, 7)


def two_dtypes_stored() -> Any:
    rows = torch.tensor([0], device=CUDA)
    return zeros(3, 5, dtype=HALF).index_copy_(0, rows, zeros(1, 5))


def two_dtypes_attended() -> Any:
    x = zeros(1, 2, 16, 8, dtype=HALF)
    return F.scaled_dot_product_attention(x, x.float(), x)


def two_devices() -> Any:
    return zeros(4) + torch.zeros(4)


def embedded_on_the_cpu() -> Any:
    return F.embedding(torch.zeros(2, 3, dtype=torch.long), zeros(10, 4))


def indexed_on_the_cpu() -> Any:
    return torch.zeros(4)[torch.tensor([1], device=CUDA)]


def stored_from_the_cpu() -> Any:
    rows = torch.tensor([1], device=CUDA)
    return zeros(4, 2).index_put((rows,), torch.zeros(1, 2))


def indices_of_the_cpu() -> Any:
    """No fault, but a copy of the indices."""
    return zeros(4)[torch.tensor([1])]


def a_number_of_the_cpu() -> Any:
    """No fault: a tensor without dimensions is passed to the kernel as a number."""
    return zeros(4) + torch.tensor(2.0)


def unknown_mask() -> Any:
    return (zeros(4) > 0).nonzero()


def written_mask() -> Any:
    """A mask whose values were known until something unknown was written to a part of it."""
    mask = zeros(4, dtype=torch.bool)
    mask[:2].copy_(zeros(2) > 0)
    return mask.nonzero()


FAULTS: dict[str, Callable[[], Any]] = {
    "two dtypes": two_dtypes,
    "two dtypes stored": two_dtypes_stored,
    "two dtypes attended": two_dtypes_attended,
    "two devices": two_devices,
    "embedded on the CPU": embedded_on_the_cpu,
    "indexed on the CPU": indexed_on_the_cpu,
    "stored from the CPU": stored_from_the_cpu,
    "indices of the CPU": indices_of_the_cpu,
    "a number of the CPU": a_number_of_the_cpu,
    "unknown mask": unknown_mask,
    "written mask": written_mask,
}


def sum_of_selected() -> int:
    """1 + 3 + 5, and 10 for each of the last two columns."""
    ids = torch.arange(6, device=CUDA)
    total = ids[ids % 2 == 1].sum()
    ids.view(2, 3)[:, 2] = 10
    return int(total) + int(ids[2] + ids[5])


def lengths_of_rows() -> list[int]:
    mask = torch.tensor([[True, True, False], [True, False, False]], device=CUDA)
    lengths: list[int] = mask.long().cumsum(1).amax(1).tolist()
    return lengths


VALUE_CHECKS: list[Callable[[], Any]] = [sum_of_selected, lengths_of_rows]


def planted_reads(counter: KernelCounter) -> dict[str, int]:
    """Returns the host waits of a micro-batch without and with a planted `.item()`, and what a batch that was left on
    the CPU raises."""
    base = fake_base("llama-3.1-8b", 1)
    batch = sft_rows(2, 32, base.model.config.vocab_size)
    with stacked_roles(base) as roles:
        algorithm = micro_batch_algorithm("sft", roles)
        plain = count_micro_batch(counter, algorithm, batch)
        planted = count_micro_batch(counter, _with_read(algorithm), batch)
        left = refusal(lambda: list(algorithm.compute_losses(batch)))
    return {
        "plain": plain.num_host_syncs,
        "planted": planted.num_host_syncs,
        "left on the CPU": int(left == "MismatchError"),
    }


def step_flops(counter: KernelCounter) -> dict[str, int]:
    """Returns the FLOPs of an SFT micro-batch of two rows by kind; the test works them out by hand."""
    totals = count_step(
        counter,
        fake_base("llama-3.1-8b", 1),
        "none",
        2,
        32,
    )
    return dict(totals.flops_by_kind)


def _with_read(algorithm: Algorithm[Any]) -> Algorithm[Any]:
    compute_losses = algorithm.compute_losses

    def reading(micro: Any) -> Any:
        for term in compute_losses(micro):
            assert term.loss.item() == 0.0
            yield term

    algorithm.compute_losses = reading  # type: ignore[method-assign]
    return algorithm
