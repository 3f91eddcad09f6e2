"""Out of memory: work that does not fit is repeated in smaller pieces, and the limit is kept for the rest of the run.

Token weights are fixed before a batch is split, so any split has the same gradient: work that failed is repeated in
halves, until it fits or a single row does not. Gradients of the failed attempt are discarded first.

Passes without gradient run in `MemoryLimits.forward_batches`, which cuts the units by a token budget. Other work passes
each of its batches to `MemoryLimits.split_on_oom`. Both need the tokens of the units and a function of some of them.
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

from lowrank_tune.batch import cut_into_batches, longest_first
from lowrank_tune.errors import OutOfMemory
from lowrank_tune.events import Emit, ignore_event, warning

OOM_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "_status_alloc_failed")
"""Texts of errors other than `OutOfMemoryError`: of CUDA, of cuBLAS, and of the CPU's allocator."""
LimitKind = Literal["update_tokens", "forward_tokens", "cache_tokens"]
LIMIT_KINDS: tuple[LimitKind, ...] = ("update_tokens", "forward_tokens", "cache_tokens")
T = TypeVar("T")
U = TypeVar("U")


class DoesNotFit(OutOfMemory):
    """The smallest piece of work is too large: a row or a pair of `tokens` tokens. `kind` is the limit that it
    exceeds."""

    def __init__(
        self,
        kind: LimitKind,
        description: str,
        tokens: int,
    ) -> None:
        super().__init__(f"out of memory: {description} of {tokens:,} tokens does not fit by itself")
        self.kind = kind
        self.tokens = tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that the GPU, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in OOM_MESSAGES)


def free_traceback(error: BaseException | None) -> None:
    """Clears the frames of a failed attempt, which reference activations and graphs, and frees the memory."""
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
    """Adds the gradients of the work inside if it succeeds. If it raises, gradients are as before, also if a backward
    pass had added some. The new gradients are summed apart, which needs memory of the size of the adapters, but only
    when the activations are freed."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        raise
    sums = []
    new_gradients = []
    for parameter, gradient in zip(parameters, before, strict=True):
        if gradient is None:
            continue
        if parameter.grad is not None:
            sums.append(gradient)
            new_gradients.append(parameter.grad)
        parameter.grad = gradient
    if sums:
        torch._foreach_add_(sums, new_gradients)


@dataclass
class MemoryLimits:
    """How much fits at once, in tokens with padding: of an update, of a pass without gradients, and of the KV cache. 0:
    no limit is known. `num_ooms` counts the out-of-memory errors. These four are saved with a checkpoint.

    `budget_bytes` is what the run may use, 0 for all. `message_prefix` begins each message.
    """

    update_tokens: int = 0
    forward_tokens: int = 0
    cache_tokens: int = 0
    num_ooms: int = 0
    budget_bytes: int = 0
    emit: Emit = field(default=ignore_event, repr=False)
    message_prefix: str = ""
    _oldest_graph: tuple[Tensor, Tensor] = field(
        init=False,
        repr=False,
        compare=False,
    )

    def __post_init__(self) -> None:
        self._oldest_graph = _make_graph()

    def to_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in (*LIMIT_KINDS, "num_ooms")}

    def restore(self, saved: Mapping[str, int]) -> None:
        """Adds the limits and errors of an earlier start of the run."""
        self.num_ooms += saved.get("num_ooms", 0)
        for kind in LIMIT_KINDS:
            setattr(self, kind, self.clamp_to_limits(kind, saved.get(kind)) or 0)

    def max_batch_units(
        self,
        kind: LimitKind,
        tokens: int,
        requested_units: int,
    ) -> int:
        """Returns how many of the requested units, each of `tokens` tokens, may be computed at once, at least 1."""
        limit: int = getattr(self, kind)
        if limit:
            return max(1, min(requested_units, limit // max(1, tokens)))
        return requested_units

    def clamp_to_limits(
        self,
        kind: LimitKind,
        tokens: int | None,
    ) -> int | None:
        """Returns a token budget, or the known limit if that is less; None if there is neither."""
        limits = [limit for limit in (getattr(self, kind), tokens) if limit]
        return min(limits, default=None)

    def split_on_oom(
        self,
        kind: LimitKind,
        units: Sequence[U],
        tokens: int,
        work: Callable[[Sequence[U]], T],
        rows_per_unit: int = 1,
    ) -> Iterator[tuple[Sequence[U], T]]:
        """Calls `work` with all units, in as many pieces as fit. Yields the units of each piece and the result.

        Each unit has `tokens` tokens in `rows_per_unit` rows. `work` must have no effects if it raises. Raises
        DoesNotFit if a single unit does not fit.
        """
        pieces = deque([units])
        while pieces:
            piece = pieces.popleft()
            max_units = self.max_batch_units(kind, tokens, len(piece))
            if len(piece) > max_units:
                starts = range(0, len(piece), max_units)
                pieces.extendleft(piece[start : start + max_units] for start in reversed(starts))
                continue
            result = self._try(work, piece)
            if result is None and len(piece) == 1:
                # The memory that the first attempt has freed may be enough.
                result = self._try(work, piece)
            if result is None:
                self.record_oom(
                    kind,
                    len(piece),
                    tokens,
                    rows_per_unit,
                )
                pieces.appendleft(piece)
            else:
                yield piece, result[0]

    def forward_batches(
        self,
        num_tokens: Sequence[int],
        max_tokens: int,
        work: Callable[[Sequence[int]], T],
        rows_per_unit: int = 1,
        families: Sequence[int] | None = None,
    ) -> Iterator[tuple[Sequence[int], T]]:
        """Calls `work`, a pass without gradient, with the indices of units of similar size, largest first: as many at
        once as `max_tokens`, padding included, and the memory allow. Yields the indices of each piece and the result.

        `num_tokens` has the tokens of each unit, in `rows_per_unit` rows. Units of one of the `families` stay adjacent.
        """
        order = longest_first(num_tokens, families or range(len(num_tokens)))
        for units in cut_into_batches(order, num_tokens, max_tokens):
            largest = max(num_tokens[unit] for unit in units)
            yield from self.split_on_oom(
                "forward_tokens",
                units,
                largest,
                work,
                rows_per_unit,
            )

    def record_oom(
        self,
        kind: LimitKind,
        units: int,
        tokens: int,
        rows_per_unit: int = 1,
    ) -> None:
        """Halves the limit after `units` units at once did not fit, and emits a warning. Raises DoesNotFit for a single
        unit."""
        self.num_ooms += 1
        if units == 1:
            if kind == "cache_tokens":
                description = "a sequence"
            elif rows_per_unit == 2:
                description = "a pair"
            else:
                description = "a row"
            raise DoesNotFit(kind, description, tokens)
        limit = -(-units // 2) * tokens
        setattr(self, kind, limit)
        message = _oom_message(
            kind,
            units * rows_per_unit,
            tokens // rows_per_unit,
            limit,
        )
        self.emit(warning(self.message_prefix + message))

    def _try(
        self,
        work: Callable[[Sequence[U]], T],
        units: Sequence[U],
    ) -> tuple[T] | None:
        """Returns the result of `work` in a tuple, or None if memory ran short. Random numbers are then as before, and
        all memory of the attempt is freed."""
        gpu_state = torch.cuda.get_rng_state() if _uses_cuda() else None
        cpu_state = torch.get_rng_state()
        try:
            return (work(units),)
        except Exception as error:
            if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
                raise
            free_traceback(error)
        # After an error in a backward pass, nodes that were not computed stay in the queue of autograd's engine, with
        # all tensors that they reference. A later pass takes the youngest nodes first and ends when it has its result.
        # Only a pass that needs the oldest node clears the queue.
        leaf, node = self._oldest_graph
        torch.autograd.grad(node, leaf, retain_graph=True)
        torch.set_rng_state(cpu_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state)
        return None


def _oom_message(
    kind: LimitKind,
    rows: int,
    width: int,
    limit: int,
) -> str:
    if kind == "cache_tokens":
        return (
            f"out of memory while decoding {rows} sequences of up to {width:,} tokens: those that had not ended are "
            f"drawn again from the same random numbers, {limit // width} at once"
        )
    if kind == "forward_tokens":
        return (
            f"out of memory while reading {rows} rows of {width:,} tokens: read again in halves; from here on at "
            f"most {limit:,} tokens at once"
        )
    return (
        f"out of memory with a micro-batch of {rows} rows of {width:,} tokens: done again in halves, with the same "
        f"gradient; from here on it has at most {limit:,} tokens, and `train.micro_batch_tokens={limit}` would begin so"
    )


def _make_graph() -> tuple[Tensor, Tensor]:
    """Returns a leaf and a node that depends on it, older than all nodes that are created later."""
    with torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        return leaf, leaf * 1
