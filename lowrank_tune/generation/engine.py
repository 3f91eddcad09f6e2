"""The rollout engine: completions as they finish, with the log-probs of the distribution that they were drawn from.

Each sequence has its own random stream, made from the seed, the prompt's number and the sample's number, so a
completion does not depend on the other sequences in the batch. A prompt is read once for all its samples, and a
sequence that ends leaves its slot to the next one at once (`decode_scheduler`). If memory runs short, the sequences
that had not ended are drawn again from the same random numbers, half as many at once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor

from lowrank_tune.batch import copy_to
from lowrank_tune.errors import OutOfMemory
from lowrank_tune.generation.cache_memory import default_cache_bytes, device_memory
from lowrank_tune.generation.cpu_linears import FastLinears
from lowrank_tune.generation.cuda_graphs import CudaCapture, StepGraphs
from lowrank_tune.generation.decode_scheduler import DecodeScheduler
from lowrank_tune.generation.decode_steps import BufferedSteps, DecodeSteps, PlainSteps
from lowrank_tune.generation.generation_mode import GenerationMode
from lowrank_tune.generation.kv_cache import KVStore
from lowrank_tune.generation.linear_weights import ScratchLimits
from lowrank_tune.generation.outputs import Completion, Token
from lowrank_tune.generation.rollout_weights import rollout_weights, verify_rollout_weights
from lowrank_tune.generation.sampler import sample
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.select_cache import select_cache
from lowrank_tune.generation.static_slot_cache import StaticSlotCache
from lowrank_tune.generation.stopping import Decode, StoppingCriteria
from lowrank_tune.model.oom import free_traceback, is_out_of_memory
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import WeightedMean

CHUNK_LOGITS = 1 << 24
"""Logits that are computed at once: 64 MiB in fp32."""
MIN_ROWS_FOR_COPIES = 4
"""Sequences at once from which products with copied weights are faster than with weights in fp32 as they are stored."""


class Engine:
    """Decodes with a role: at most `slots` sequences at once, and no more than fit `cache_bytes` of keys and values
    (but always one).

    On the CPU, copies of weights that fit `scratch_bytes` are made for a call, by default a quarter of the machine's
    memory; without `fast_modules`, transformers' own modules are used as they are. `cache_bytes` is by default
    `default_cache_bytes`. `decode` turns tokens into text, for stop strings.

    With `buffered`, which is the default on a GPU, several tokens of each sequence are drawn before the host reads them
    (`Roles.decoding`).
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
        self.buffered = roles.base.device.type == "cuda"
        self._num_drawn = 0
        self._num_dropped = 0
        self.fast_modules = True
        self.fast_linears: FastLinears | None = None
        if cache_bytes is None:
            cache_bytes = default_cache_bytes(roles)
        if scratch_bytes is None:
            scratch_bytes = device_memory(roles.base.device) // 4
        self.cache_bytes = cache_bytes
        self.scratch_bytes = scratch_bytes

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        numbers: Sequence[int] | None = None,
        expected_lengths: Sequence[int] | None = None,
    ) -> Iterator[Completion]:
        """Yields `n` completions of each prompt, in the order in which they finish. Adapters are used as they are when
        the first completion is requested.

        `numbers` name the random streams of the prompts if these are a part of more; by default they are 0, 1, ...
        `expected_lengths` are those of the completions of each prompt, so that long ones start first; completions do
        not depend on them. Raises ValueError for an empty prompt and for stop strings without `decode`, TrainingError
        for logits that are not finite.
        """
        scheduler = self._make_scheduler(
            prompts,
            n,
            sampling,
            numbers,
            expected_lengths,
        )
        return cast(Iterator[Completion], self._run(scheduler, stream_tokens=False))

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
    ) -> Generator[Token | Completion, None, None]:
        """Yields each token as it is drawn, and a `Completion` after the last token of each sequence. Between two
        tokens everything is as the caller left it, so streams of several roles may alternate. Closing the iterator
        ends it. Raises as `generate`."""
        scheduler = self._make_scheduler(
            prompts,
            n,
            sampling,
            None,
        )
        return self._run(scheduler, stream_tokens=True)

    def wasted_ratio(self) -> WeightedMean | None:
        """Returns the share of the tokens drawn by buffered steps that were dropped, because their completion had ended
        before the host read them; None if there were no such steps."""
        if not self._num_drawn:
            return None
        return WeightedMean(self._num_dropped, self._num_drawn)

    def generation_mode(self) -> GenerationMode:
        """Returns the mode in which the forward passes of a rollout run."""
        return GenerationMode(self.roles, self.role)

    @contextmanager
    def prepared_weights(
        self,
        rows: int = 1,
        copy_limit: int = 0,
    ) -> Iterator[AbstractContextManager[None]]:
        """The context of a whole rollout with steps of up to `rows` rows, which yields the context of each stretch of
        its forward passes, with faster modules. On a GPU they have copies of weights that fit `copy_limit` bytes, on
        the CPU such that fit `scratch_bytes`."""
        base = self.roles.base
        if base.device.type == "cuda":
            with rollout_weights(self.roles, self._stack, base.dtype, rows, copy_limit) as weights:
                yield weights
        elif base.device.type == "cpu" and base.dtype == torch.float32 and self.fast_modules:
            limits = ScratchLimits(self.scratch_bytes, copies_fp32=self.slots >= MIN_ROWS_FOR_COPIES)
            linears = FastLinears(base.model, self._stack, self.roles.head, limits, self.roles.limits.emit)
            self.fast_linears = linears
            try:
                yield linears
            finally:
                self.fast_linears = None
                linears.close()
        else:
            yield nullcontext()

    @property
    def _stack(self) -> list[str]:
        return [] if self.role == "base" else self.roles.stacks[self.role]

    def _verify_weights(self, slots: int) -> None:
        """Compares the fast modules of a GPU with the plain ones, once."""
        mode = self.generation_mode()

        def hidden(input_ids: Tensor) -> Tensor:
            with mode.enter():
                decoder = self.roles.base.model.get_decoder()
                return cast(Tensor, decoder(input_ids=input_ids, use_cache=False).last_hidden_state)

        verify_rollout_weights(self.roles, self._stack, self.roles.base.dtype, hidden, slots, self.cache_bytes)

    def _copy_limit(self, store: KVStore) -> int:
        """Returns the bytes for copies of weights: what the slots leave of those for keys and values. After an
        out-of-memory error there are none."""
        if not isinstance(store, StaticSlotCache) or self.roles.limits.cache_tokens:
            return 0
        return store.unused_bytes(self.cache_bytes)

    def sample(
        self,
        sampling: SamplingParams,
        hidden: Tensor,
        uniform: Tensor,
    ) -> Tensor:
        """Draws a token for each hidden state (N, d) with N uniform numbers (N,) float64. Returns (N, 2) float64, the
        tokens and their log-probs."""
        rows_at_once = max(1, CHUNK_LOGITS // self.roles.head.weight.shape[0])
        pairs = []
        for start in range(0, len(hidden), rows_at_once):
            chunk = slice(start, start + rows_at_once)
            pairs.append(self._sample_chunk(hidden[chunk], uniform[chunk], sampling))
        return torch.cat(pairs)

    def _sample_chunk(
        self,
        hidden: Tensor,
        uniform: Tensor,
        sampling: SamplingParams,
    ) -> Tensor:
        """Returns (N, 2) float64, tokens and log-probs. The logits are freed here, before those of the next chunk."""
        head = self.roles.head
        if self.fast_linears is not None:
            head = self.fast_linears.head
        logits = head.logits(hidden, sampling.temperature or 1.0)
        tokens, logps = sample(logits, sampling, uniform)
        return torch.stack([tokens.double(), logps], dim=1)

    def _make_scheduler(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        numbers: Sequence[int] | None,
        expected_lengths: Sequence[int] | None = None,
    ) -> DecodeScheduler:
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("an empty prompt: a prompt needs at least one token")
        stops = StoppingCriteria(sampling, self.decode)
        return DecodeScheduler(
            prompts,
            n,
            sampling,
            stops,
            numbers or range(len(prompts)),
            expected_lengths,
        )

    def _run(
        self,
        scheduler: DecodeScheduler,
        stream_tokens: bool,
    ) -> Generator[Token | Completion, None, None]:
        """Decodes all sequences; after an out-of-memory error those that have not ended again, in fewer slots."""
        if not scheduler.num_unfinished:
            return
        limits = self.roles.limits
        columns = scheduler.columns
        if self.roles.base.rope is not None:
            self.roles.base.rope.check_row_length(columns)
        # On the CPU decoding has linears of its own (`cpu_linears`).
        if self.roles.base.device.type != "cpu":
            self.roles.verify_fast_paths(self.role)
            self._verify_weights(self.slots)
        slots = min(self.slots, scheduler.num_unfinished)
        while True:
            scheduler.start(limits.max_batch_units("cache_tokens", columns, slots))
            try:
                yield from self._decode_all(scheduler, stream_tokens)
                return
            except Exception as error:
                # A token that the caller has received cannot be drawn again.
                if not is_out_of_memory(error) or isinstance(error, OutOfMemory) or scheduler.tokens_streamed:
                    raise
                free_traceback(error)
            # A sequence alone may fit where several that share a prompt did not.
            units = min(scheduler.slots, max(scheduler.unshared_slots, 2))
            limits.record_oom("cache_tokens", units, columns)
            slots = scheduler.num_unfinished

    def _decode_all(
        self,
        scheduler: DecodeScheduler,
        stream_tokens: bool,
    ) -> Iterator[Token | Completion]:
        mode = self.generation_mode()
        with mode.enter():
            # One sample of each prompt has nothing to share.
            wants_pages = self.roles.decoding.prefix_caching and scheduler.n > 1
            store = select_cache(self.roles.base.model, self.roles.limits.emit, wants_pages)
            slots = store.allocate(scheduler.slots, scheduler.columns, self.cache_bytes)
            scheduler.set_slots(slots, store.unshared_slots if isinstance(store, StaticSlotCache) else slots)
            copy_limit = self._copy_limit(store)
        with self.prepared_weights(scheduler.slots, copy_limit) as weights:
            steps = self._make_steps(scheduler, store, stream_tokens)
            while not scheduler.is_done:
                # Between two yields the caller may use other roles and train: modes, adapters and modules are then as
                # the caller left them.
                with mode.enter(), weights:
                    outputs = self._next_outputs(
                        scheduler,
                        store,
                        steps,
                        stream_tokens,
                    )
                yield from outputs

    def _make_steps(
        self,
        scheduler: DecodeScheduler,
        store: KVStore,
        stream_tokens: bool,
    ) -> DecodeSteps:
        """Returns the fastest kind of steps for the device and the cache."""
        sampling = scheduler.sampling
        draw = partial(self.sample, sampling)
        device = self.roles.base.device
        # A budget ends all sequences at the same step, which depends on when slots are filled again.
        if not self.buffered or sampling.budget is not None or not isinstance(store, StaticSlotCache):
            return PlainSteps(store, draw, device)
        # Steps that read values wait for the device anyway.
        if device.type == "cuda" and not store.is_capturable:
            return PlainSteps(store, draw, device)
        return BufferedSteps(
            store,
            draw,
            sampling.max_new_tokens,
            1 if stream_tokens else self.roles.decoding.sync_every,
            self._make_graphs(),
        )

    def _make_graphs(self) -> StepGraphs | None:
        """Returns the graphs of a rollout, None where there are none."""
        options = self.roles.decoding
        if self.roles.base.device.type != "cuda" or not options.cuda_graphs:
            return None
        return StepGraphs(CudaCapture(), options, self.roles.limits.emit)

    def _next_outputs(
        self,
        scheduler: DecodeScheduler,
        store: KVStore,
        steps: DecodeSteps,
        stream_tokens: bool,
    ) -> list[Token | Completion]:
        """Decodes until a sequence ends, or for one step if tokens are streamed."""
        outputs: list[Token | Completion] = []
        while not outputs:
            if scheduler.is_out_of_budget:
                return [*scheduler.truncate_all()]
            self._prefill(scheduler, store)
            # An admitted sequence has its first token already, so a step either admits or decodes.
            admitted = _admit(scheduler, store)
            for slots in [admitted] if admitted else self._decode(scheduler, store, steps):
                if stream_tokens:
                    outputs += scheduler.last_tokens(slots)
                outputs += scheduler.retire(slots)
            store.release(scheduler.ended_slots())
        return outputs

    def _prefill(
        self,
        scheduler: DecodeScheduler,
        store: KVStore,
    ) -> None:
        """Reads the next prompts, if the scheduler names any, and draws the first token of each of their samples."""
        prompts = scheduler.next_prompts()
        if not prompts:
            return
        cache, hidden = store.prefill([scheduler.prompts[prompt] for prompt in prompts])
        sequences = scheduler.add_prefilled(prompts, cache)
        rows = [prompts.index(sequence.prompt) for sequence in sequences]
        prompt_states = hidden[copy_to(torch.tensor(rows), hidden.device)]
        uniforms = [next(sequence.uniforms) for sequence in sequences]
        uniform = copy_to(torch.tensor(uniforms, dtype=torch.float64), hidden.device)
        drawn = self.sample(scheduler.sampling, prompt_states, uniform).tolist()
        for sequence, (token, logp) in zip(sequences, drawn, strict=True):
            sequence.append(token, logp)

    def _decode(
        self,
        scheduler: DecodeScheduler,
        store: KVStore,
        steps: DecodeSteps,
    ) -> Iterator[list[int]]:
        """Draws the next tokens of every sequence that has a slot. Yields the slots that have a new token, step by
        step; the caller retires them before the next one."""
        for move in scheduler.compact():
            store.move(move.source, move.target, move.length)
        sequences = scheduler.decoding()
        for drawn in steps.run(sequences):
            slots = scheduler.append_drawn(sequences, drawn)
            if isinstance(steps, BufferedSteps):
                self._num_drawn += len(sequences)
                self._num_dropped += len(sequences) - len(slots)
            yield slots


def _admit(scheduler: DecodeScheduler, store: KVStore) -> list[int]:
    """Copies prefilled prompts into free slots. Returns the slots that were filled."""
    filled = []
    for placement in scheduler.admit(store.room):
        cache_rows = [placement.cache_row] * len(placement.slots)
        store.insert(placement.cache, cache_rows, placement.slots)
        filled += placement.slots
    return filled
