"""Out of memory in the middle of a step: the step goes on in smaller pieces, with the same gradient, and memory is as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from card.machine import GIB, free, peak_gib, reset_peak
from card.made import Size, Train, random_rows
from card.makers import make_roles, sft
from card.smoke import Result
from lowrank_tune.model.base import Base
from lowrank_tune.model.recovery import Limits
from lowrank_tune.train import Loop

SLACK = 1 << 20
"""Bytes: what some cache may have kept."""
Shortage = Callable[[], AbstractContextManager[None]]


def shortage(base: Base, size: Size, cap_gib: float | None, equal: float, result: Result) -> None:
    """One step with all the memory, with a row at once, and with memory for less than its micro-batch; adds to the result."""
    whole, _, most = step(base, size, size.micro, nullcontext)
    rows, _, least = step(base, size, 1, nullcontext)
    before = allocated(base)
    broken, times, _ = step(base, size, size.micro, lambda: scarce(base, (most + least) / 2, cap_gib))
    result.figures |= {"times that memory ran short": float(times), "gradient, redone in pieces: relative difference": off(broken, whole),
                       "gradient, a row at once: relative difference": off(rows, whole)}  # fmt: skip
    result.checks["memory ran short, and the step went on"] = times >= 1
    result.checks["the same gradient, redone in pieces"] = off(broken, whole) <= equal
    result.checks["memory is as it was before"] = abs(allocated(base) - before) <= SLACK


def off(gradient: Tensor, whole: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient - whole) / torch.linalg.vector_norm(whole))


def allocated(base: Base) -> int:
    """Bytes of all tensors on the card; 0 without one."""
    free(base.device)
    return torch.cuda.memory_allocated(base.device) if base.device.type == "cuda" else 0


def step(base: Base, size: Size, micro: int, short: Shortage) -> tuple[Tensor, int, float]:
    """The gradient of one step of the loop on the CPU, how often memory ran short, and the most memory in GiB."""
    roles = make_roles(base, ("policy",), True)
    roles.limits = Limits()
    parameters, kept = roles.parameters("policy"), list[Tensor]()
    with torch.no_grad():  # a fresh B is zero, and A then has no gradient
        for name, parameter in roles.named_parameters("policy").items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 1e-2)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: kept.extend(p.grad.flatten().float().cpu() for p in parameters if p.grad is not None))
    algorithm = sft(roles, lambda number: random_rows(size, base.model.config.vocab_size), size)
    free(base.device)
    reset_peak(base.device)
    with short():
        Loop(algorithm, parameters, optimizer, Train(micro_batch_size=micro), 1, 0, base.device,  # type: ignore[arg-type]
             lambda event: None, lambda progress, last: None, checked=True, limits=roles.limits).run()  # fmt: skip
    peak = peak_gib(base.device) if base.device.type == "cuda" else 0.0
    times = roles.limits.times
    roles.release()
    return torch.cat(kept), times, peak


@contextmanager
def scarce(base: Base, gib: float, cap_gib: float | None) -> Iterator[None]:
    """On a card, torch may take only so much. Without one, the backward pass of more than one row dies in its last layer, as on a full card,
    when all others have added to the gradient."""
    if base.device.type == "cuda":
        total = torch.cuda.get_device_properties(base.device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(gib / total, base.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_gib or total) / total), base.device)
        return

    def fail(module: Any, given: Any, named: Any) -> None:
        backward = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
        if backward and max(one.shape[0] for one in (*given, *named.values()) if isinstance(one, Tensor)) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. (Nobody has taken it: this is a test without a card.)")

    handle = base.model.get_decoder().layers[0].mlp.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
