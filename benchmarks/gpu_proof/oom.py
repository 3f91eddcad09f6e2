"""Out of memory in the middle of a step: the step continues in smaller pieces, with the same gradient, and memory is
as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gpu_proof.checks import CheckResult
from gpu_proof.factories import make_roles, randomize_b, sft
from gpu_proof.machine import GIB, peak_gib, release_unused, reset_peak
from gpu_proof.synthetic import Size, TrainSettings, ragged_rows
from lowrank_tune.model.base import Base
from lowrank_tune.model.oom import MemoryLimits
from lowrank_tune.model.rounding import allowed_difference, relative_difference
from lowrank_tune.training.trainer import Trainer

SLACK_BYTES = 1 << 20
"""What a cache may have kept."""
GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative difference of gradients of the same arithmetic; on a GPU the backward of attention adds in any order."""
Shortage = Callable[[], AbstractContextManager[None]]


def check_recovery(base: Base, size: Size, cap_gib: float | None) -> CheckResult:
    """Run one step with all the memory, one with a row at once, and one with too little memory for its micro-batch.

    Another micro-batch size alone changes the rounding of bf16 products (on an H200 the gradient by 7 %), so recovery
    may change the gradient by as much as `allowed_difference` makes of that.
    """
    result = CheckResult("oom")
    whole, _, peak_whole = step(base, size, size.micro, nullcontext)
    rows, _, peak_rows = step(base, size, 1, nullcontext)
    before = allocated_bytes(base)
    recovered, times, _ = step(base, size, size.micro, lambda: shortage(base, (peak_whole + peak_rows) / 2, cap_gib))
    rounding, difference = relative_difference(rows, whole), relative_difference(recovered, whole)
    result.figures |= {
        "out_of_memory_errors": float(times),
        "recovered_gradient_difference": difference,
        "single_rows_gradient_difference": rounding,
    }
    tolerance = allowed_difference(GRADIENT_ERROR[base.model.dtype], rounding)
    result.checks["memory ran out, and the step continued"] = times >= 1
    result.checks["the same gradient after recovery"] = difference <= tolerance
    result.checks["memory is as before"] = abs(allocated_bytes(base) - before) <= SLACK_BYTES
    return result


def allocated_bytes(base: Base) -> int:
    """Return the bytes of all tensors on the GPU; 0 without one."""
    release_unused(base.device)
    return torch.cuda.memory_allocated(base.device) if base.device.type == "cuda" else 0


def step(base: Base, size: Size, micro: int, limited: Shortage) -> tuple[Tensor, int, float]:
    """Return the gradient of one step of the loop on the CPU, how often memory ran out, and the peak memory in GiB."""
    roles = make_roles(base, ("policy",), True)
    roles.limits = MemoryLimits()
    parameters, gradients = roles.parameters("policy"), list[Tensor]()
    randomize_b(roles, "policy")
    optimizer = torch.optim.SGD(parameters, lr=0.0)

    def keep_gradients(*_: Any) -> None:
        gradients.extend(
            parameter.grad.flatten().float().cpu() for parameter in parameters if parameter.grad is not None
        )

    optimizer.register_step_pre_hook(keep_gradients)
    algorithm = sft(roles, lambda number: ragged_rows(size, base.model.config.vocab_size), size)
    release_unused(base.device)
    reset_peak(base.device)
    with limited():
        loop = Trainer(
            algorithm,
            parameters,
            optimizer,
            TrainSettings(micro_batch_size=micro),  # type: ignore[arg-type]
            1,
            0,
            base.device,
            lambda event: None,
            lambda progress, last: None,
            checked=True,
            limits=roles.limits,
        )
        loop.run()
    peak = peak_gib(base.device) if base.device.type == "cuda" else 0.0
    times = roles.limits.num_ooms
    roles.unload_adapters()
    return torch.cat(gradients), times, peak


@contextmanager
def shortage(base: Base, gib: float, cap_gib: float | None) -> Iterator[None]:
    """On a GPU, limit the process to `gib`. On a CPU, the backward pass of more than one row raises in its last
    layer, after all other layers have added to the gradient."""
    if base.device.type == "cuda":
        total = torch.cuda.get_device_properties(base.device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(gib / total, base.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_gib or total) / total), base.device)
        return

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        backward = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
        rows = [value.shape[0] for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if backward and max(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. (Raised by a test without a GPU.)")

    handle = base.model.get_decoder().layers[0].mlp.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
