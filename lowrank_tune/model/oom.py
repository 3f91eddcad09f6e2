"""Out of memory: noticed, cleaned up after, done again in smaller pieces, and remembered for the rest of the run.

Weights are fixed before a batch is split, so any split has the same gradient: what ran short is begun again in halves,
until it fits or a single row does not. What the failed attempt had added to gradients is taken back first.
"""

from __future__ import annotations

import gc
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lowrank_tune.errors import OutOfMemory
from lowrank_tune.events import Emit, Event, LogMessage

OOM_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "_status_alloc_failed")
"""What says so in an error that is no `OutOfMemoryError`: CUDA's own, cuBLAS', and that of the CPU's allocator."""
LimitKind = Literal["update_tokens", "forward_tokens", "cache_tokens"]
T = TypeVar("T")
U = TypeVar("U")


class DoesNotFit(OutOfMemory):
    """The smallest piece of work is too large: a row of `tokens` tokens, or a pair. `kind` says of what work."""

    def __init__(self, kind: LimitKind, description: str, tokens: int) -> None:
        super().__init__(f"out of memory: {description} of {tokens:,} tokens does not fit by itself")
        self.kind = kind
        self.tokens = tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in OOM_MESSAGES)


def free_traceback(error: BaseException | None) -> None:
    """Drops what the frames of a failed attempt hold: activations, and graphs that hold others. The memory goes back to
    the device."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if _uses_cuda():
        torch.cuda.empty_cache()


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def atomic_grad_accumulation(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The gradients of what happens inside are added where it ends well; where it raises, all are as before, though a
    backward pass that died in its middle had added some. They are summed apart, which costs the size of the adapters,
    when activations are gone."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        raise
    sums: list[Tensor] = []
    more: list[Tensor] = []
    for parameter, gradient in zip(parameters, before, strict=True):
        if gradient is not None:
            if parameter.grad is not None:
                sums.append(gradient)
                more.append(parameter.grad)
            parameter.grad = gradient
    if sums:
        torch._foreach_add_(sums, more)


def _ignore_event(event: Event) -> None:
    pass


@dataclass
class MemoryLimits:
    """How much at once has turned out to fit, in tokens with padding: of an update, of a pass without gradient, and of
    keys and values that are decoded with. 0: no limit is known. `num_ooms` counts how often memory ran short. All this
    is saved with a checkpoint.

    `budget_bytes` is what the run may use, 0 for all; `message_prefix` begins what is told.
    """

    update_tokens: int = 0
    forward_tokens: int = 0
    cache_tokens: int = 0
    num_ooms: int = 0
    budget_bytes: int = 0
    emit: Emit = field(default=_ignore_event, repr=False)
    message_prefix: str = ""
    _oldest: tuple[Tensor, Tensor] = field(default_factory=lambda: _old_graph(), init=False, repr=False, compare=False)

    def to_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("update_tokens", "forward_tokens", "cache_tokens", "num_ooms")}

    def restore(self, saved: Mapping[str, int]) -> None:
        """Adds what an earlier start of the run had found out."""
        self.num_ooms += saved.get("num_ooms", 0)
        for name in ("update_tokens", "forward_tokens", "cache_tokens"):
            setattr(self, name, min((limit for limit in (getattr(self, name), saved.get(name, 0)) if limit), default=0))

    def max_batch_units(self, kind: LimitKind, tokens: int, requested_units: int) -> int:
        """How many units of so many tokens at once, of those wanted; one is always tried."""
        limit: int = getattr(self, kind)
        if limit:
            return max(1, min(requested_units, limit // max(1, tokens)))
        return requested_units

    def clamp_to_limits(self, kind: LimitKind, tokens: int | None) -> int | None:
        """A budget of tokens, or what is known to fit where that is less; None for none."""
        return min((limit for limit in (getattr(self, kind), tokens) if limit), default=None)

    def split_on_oom(
        self,
        kind: LimitKind,
        units: Sequence[U],
        tokens: int,
        work: Callable[[Sequence[U]], T],
        rows_per_unit: int = 1,
    ) -> Iterator[tuple[Sequence[U], T]]:
        """What `work` makes of the units, each of them `tokens` tokens, in as many pieces as it takes, and of which
        units.

        `work` must leave nothing behind where it raises. A unit is `rows_per_unit` rows. Raises DoesNotFit where a
        single unit is too much.
        """
        waiting = deque([units])
        while waiting:
            some = waiting.popleft()
            max_units = self.max_batch_units(kind, tokens, len(some))
            if len(some) > max_units:
                waiting.extendleft(
                    some[start : start + max_units] for start in reversed(range(0, len(some), max_units))
                )
                continue
            done = _attempt(work, some, self._oldest)
            if done is None and len(some) == 1:  # what was let go may have been all that it lacked
                done = _attempt(work, some, self._oldest)
            if done is not None:
                yield some, done[0]
                continue
            self.record_oom(kind, len(some), tokens, rows_per_unit)
            waiting.appendleft(some)

    def record_oom(self, kind: LimitKind, units: int, tokens: int, rows_per_unit: int = 1) -> None:
        """So many units at once were too much: half as many from here on. Says so; raises DoesNotFit where there is no
        half."""
        self.num_ooms += 1
        if units == 1:
            if kind == "cache_tokens":
                description = "a sequence"
            elif rows_per_unit == 2:
                description = "a pair"
            else:
                description = "a row"
            raise DoesNotFit(kind, description, tokens)
        setattr(self, kind, -(-units // 2) * tokens)
        self.emit(
            LogMessage(
                level="warning",
                message=self.message_prefix
                + _oom_message(kind, units * rows_per_unit, tokens // rows_per_unit, getattr(self, kind)),
            )
        )


def _oom_message(kind: LimitKind, rows: int, width: int, limit: int) -> str:
    if kind == "cache_tokens":
        return (
            f"out of memory while decoding {rows} sequences of up to {width:,} tokens: those that had not ended are "
            f"drawn again from the "
            f"same random numbers, {limit // width} at once"
        )
    if kind == "forward_tokens":
        return (
            f"out of memory while reading {rows} rows of {width:,} tokens: read again in halves; from here on at "
            f"most {limit:,} tokens "
            "at once"
        )
    return (
        f"out of memory with a micro-batch of {rows} rows of {width:,} tokens: done again in halves, with the same "
        f"gradient; from here "
        f"on it has at most {limit:,} tokens, and `train.micro_batch_tokens={limit}` would begin so"
    )


def _old_graph() -> tuple[Tensor, Tensor]:
    """A leaf and a node over it, older than all that comes later."""
    with torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        return leaf, leaf * 1


def _attempt(work: Callable[[U], T], units: U, oldest: tuple[Tensor, Tensor]) -> tuple[T] | None:
    """What `work` gives, in a tuple; None where memory ran short. Random numbers are then as before, and nothing of it
    is held."""
    device = torch.cuda.get_rng_state() if _uses_cuda() else None
    before = torch.get_rng_state()
    try:
        return (work(units),)
    except Exception as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
            raise
        free_traceback(error)
    # Where a backward pass dies, what it had not come to waits in the engine's queue of this thread, with all that it
    # holds. A later pass takes the youngest nodes first and ends when it has what it wants: only one that wants the
    # oldest node clears the queue.
    torch.autograd.grad(oldest[1], oldest[0], retain_graph=True)
    torch.set_rng_state(before)
    if device is not None:
        torch.cuda.set_rng_state(device)
    return None
