"""The rollout engine: completions as they finish, with the log-probs of the distribution that they were drawn from.

Each sequence has its own random stream, made of the seed, the prompt's number and the sample's number, so what it says
does not hang on its neighbors. A prompt is read once for all its samples; a sequence that ends leaves its slot to the
next one at once. Where memory runs short, what had not ended is drawn again from the same random numbers, half as many
sequences at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowrank_tune.errors import OutOfMemory
from lowrank_tune.generation.attention import batched_attention
from lowrank_tune.generation.cpu_linears import fast_linears
from lowrank_tune.generation.decode_scheduler import DecodeScheduler
from lowrank_tune.generation.outputs import Completion, Token
from lowrank_tune.generation.sampler import sample
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.select_cache import select_cache
from lowrank_tune.generation.stopping import Decode, StoppingCriteria
from lowrank_tune.model.oom import free_traceback, is_out_of_memory
from lowrank_tune.model.roles import Roles

T = TypeVar("T")
CHUNK_LOGITS = 1 << 24  # made at once: 64 MiB in fp32
USABLE_MEMORY_FRACTION = 0.92  # of a GPU: the rest is lost between blocks
WORKSPACE_BYTES = 3 << 29  # CUDA's context and libraries, logits, and the activations of a prompt that is read: 1.5 GiB


@dataclass
class _RetryState:
    """What outlives an attempt: how many sequences are decoded at once, the samples of prompts that have ended, their
    tokens, and whether somebody saw tokens of others, which cannot be drawn again then."""

    slots: int
    ended: set[tuple[int, int]] = field(default_factory=set)
    spent: int = 0
    shown: bool = False

    def record(self, output: object) -> None:
        if isinstance(output, Completion):
            self.ended.add((output.prompt, output.sample))
            self.spent += len(output.token_ids)
        else:
            self.shown = True


class Engine:
    """Decodes with a role. At most `slots` sequences at once, and no more than fit `cache_bytes` of keys and values
    (but always one).

    On the CPU 4-bit weights are unpacked for the time of a call where they fit `scratch_bytes`, a quarter of the
    machine's memory by default. `cache_bytes` is by default what `default_cache_bytes` says. `decode` is for stop
    strings.
    """

    def __init__(
        self,
        roles: Roles,
        role: str,
        slots: int = 256,
        cache_bytes: int | None = None,
        scratch_bytes: int | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.roles = roles
        self.role = role
        self.slots = slots
        self.decode = decode
        if cache_bytes is None:
            self.cache_bytes = default_cache_bytes(roles)
        else:
            self.cache_bytes = cache_bytes
        if scratch_bytes is None:
            self.scratch_bytes = device_memory(roles.base.device) // 4
        else:
            self.scratch_bytes = scratch_bytes

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Completion]:
        """`n` completions of each prompt, in the order in which they finish. Adapters speak as they are when the first
        one is asked for.

        `numbers` name the random streams of the prompts where these are a part of more; by default they are their
        places here. Raises ValueError for an empty prompt and for stop strings without `decode`, TrainingError for
        logits that are not finite.
        """
        return self._run(
            prompts,
            n,
            sampling,
            self._stopping_criteria(prompts, sampling),
            DecodeScheduler.run_until_any_finished,
            numbers,
        )

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
    ) -> Generator[Token | Completion, None, None]:
        """The same token by token, as they are drawn; a `Completion` follows the last token of each. For somebody who
        watches: between two tokens everything is as the caller left it, so streams of several roles may alternate.
        Closing the iterator ends it."""
        return self._run(prompts, n, sampling, self._stopping_criteria(prompts, sampling), DecodeScheduler.step_tokens)

    def _stopping_criteria(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> StoppingCriteria:
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("an empty prompt: there is nothing to go on from")
        return StoppingCriteria(sampling, self.decode)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        stops: StoppingCriteria,
        step_fn: Callable[[DecodeScheduler, StoppingCriteria], list[T]],
        numbers: Sequence[int] | None = None,
    ) -> Generator[T, None, None]:
        if not prompts or n < 1 or sampling.max_new_tokens < 1:
            return
        limits = self.roles.limits
        columns = max(map(len, prompts)) + sampling.max_new_tokens
        if self.roles.base.rope is not None:
            self.roles.base.rope.check_row_length(columns)
        progress = _RetryState(limits.max_batch_units("cache_tokens", columns, min(self.slots, n * len(prompts))))
        while True:
            try:
                yield from self._generate(prompts, n, sampling, stops, step_fn, numbers, columns, progress)
                return
            except Exception as error:
                if not is_out_of_memory(error) or isinstance(error, OutOfMemory) or progress.shown:
                    raise
                free_traceback(error)
            limits.record_oom("cache_tokens", progress.slots, columns)
            progress.slots = limits.max_batch_units("cache_tokens", columns, n * len(prompts) - len(progress.ended))

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        stops: StoppingCriteria,
        step_fn: Callable[[DecodeScheduler, StoppingCriteria], list[T]],
        numbers: Sequence[int] | None,
        columns: int,
        progress: _RetryState,
    ) -> Iterator[T]:
        """All that has not ended yet."""
        model = self.roles.base.model
        stack = [] if self.role == "base" else self.roles.stacks[self.role]
        states = [vars(module) for module in model.modules()]
        # The store's own check then compares this attention with plain passes over the user's own base.
        with self._generation_mode(states), batched_attention(model):
            store = select_cache(model, self.roles.limits.emit)
            progress.slots = store.allocate(progress.slots, columns, self.cache_bytes)
        schedule = DecodeScheduler(
            store,
            lambda hidden, uniforms: self._sample(hidden, uniforms, sampling),
            prompts,
            n,
            sampling,
            progress.slots,
            numbers or range(len(prompts)),
            progress.ended,
            progress.spent,
        )
        with fast_linears(model, stack, self.scratch_bytes) as linears:
            while not schedule.is_done:
                # Between two yields the caller may use other roles and train: modes, adapters and modules are then as
                # it left them.
                with self._generation_mode(states), linears, batched_attention(model):
                    outputs = step_fn(schedule, stops)
                for output in outputs:
                    progress.record(output)
                    yield output

    @contextmanager
    def _generation_mode(self, states: Sequence[dict[str, Any]]) -> Iterator[None]:
        device = self.roles.base.device.type
        with (
            _inference_mode(states, device),
            self.roles.activate(self.role),
            self.roles.base.autocast(),
            self.roles.base.transformers_forward(),
        ):
            yield

    def _sample(self, hidden: Tensor, uniforms: list[float], sampling: SamplingParams) -> list[list[float]]:
        """(N, d) and N uniform numbers -> a token and its log-prob for each, in one transfer from the device."""
        head = self.roles.head
        numbers = torch.tensor(uniforms, dtype=torch.float64, device=hidden.device)
        at_once = max(1, CHUNK_LOGITS // head.weight.shape[0])
        parts = [
            sample(head.logits(part, sampling.temperature or 1.0), sampling, some)
            for part, some in zip(torch.split(hidden, at_once), torch.split(numbers, at_once), strict=True)
        ]
        tokens, logps = (torch.cat(column) for column in zip(*parts, strict=True))
        return torch.stack([tokens.double(), logps], dim=1).tolist()


@contextmanager
def _inference_mode(states: Sequence[dict[str, Any]], device: str) -> Iterator[None]:
    """As `Roles.quiet`, for the attributes of all modules: a walk over the tree, there and back for every few steps,
    costs as much as a step.

    On the CPU, where a step is hundreds of small operations, PyTorch does not even count the versions of tensors: an
    eighth of the time.
    """
    training = [state for state in states if state["training"]]
    for state in training:
        state["training"] = False
    try:
        with torch.inference_mode() if device == "cpu" else torch.no_grad():
            yield
    finally:
        for state in training:
            state["training"] = True


def default_cache_bytes(roles: Roles) -> int:
    """Bytes for keys and values. On a GPU all that the run may use, but for what stays there and some to work with:
    while sequences are decoded, no activation of an update lives. Else a budget, or a quarter of the machine's memory.
    What is free now does not count: it would make one run differ from the next.
    """
    budget = roles.limits.budget_bytes
    device = roles.base.device
    if device.type != "cuda":
        return budget or device_memory(device) // 4
    return gpu_cache_bytes(min(budget or device_memory(device), device_memory(device)), roles.resident_bytes())


def gpu_cache_bytes(budget: int, resident: int) -> int:
    """Bytes for keys and values of a budget on a GPU where so many stay for the whole run."""
    return max(int(budget * USABLE_MEMORY_FRACTION) - resident - WORKSPACE_BYTES, budget // 16)


def device_memory(device: torch.device) -> int:
    """Bytes that there are, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
