"""Continuous batching: which prompts are read, which sequences decode in which slots, and which have ended.

The scheduler runs no model. `Engine` passes in what the model and the sampler computed, and gets back what to run next:

    next_prompts -> (engine reads the prompts) -> add_prefilled -> admit -> (engine fills the slots)
    compact -> decoding -> (engine decodes one token of each sequence) -> retire -> ended_slots
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lowrank_tune.errors import TrainingError
from lowrank_tune.generation.outputs import Completion, Token
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.stopping import StoppingCriteria

UNIFORMS_PER_BLOCK = 64
"""Random numbers that are drawn from a stream at a time."""
PREFILL_TOKENS = 4096
"""Tokens of the prompts of one prefill, with padding."""


@dataclass
class SequenceState:
    """A sequence that is decoded. `length` of its tokens are in the KV cache: all but the last one."""

    prompt: int
    sample: int
    length: int
    uniforms: Iterator[float]
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    def append(
        self,
        token: float,
        logp: float,
    ) -> None:
        """Adds the next token. Raises TrainingError if its log-prob is not a number."""
        if math.isnan(logp):
            raise TrainingError(
                "the logits of a completion are not finite: the training of its adapter has diverged",
            )
        self.token_ids.append(int(token))
        self.logps.append(logp)

    def to_completion(self, finish_reason: Literal["stop", "length", "budget"]) -> Completion:
        return Completion(
            self.prompt,
            self.sample,
            self.token_ids,
            finish_reason,
            self.logps,
        )


@dataclass
class _PrefilledPrompt:
    """A prompt that was read: its row in `cache`, and the samples that have their first token and wait for slots."""

    samples: deque[SequenceState]
    cache: Any
    cache_row: int


@dataclass(frozen=True)
class Placement:
    """Slots that sequences of one prompt take: `cache_row` of `cache` is copied into each of them."""

    cache: Any
    cache_row: int
    slots: list[int]


@dataclass(frozen=True)
class SlotMove:
    """A sequence with `length` cached tokens that changes its slot."""

    source: int
    target: int
    length: int


class DecodeScheduler:
    """The sequences of one call: `n` samples of each prompt, at most `slots` of them decoding at once."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        stops: StoppingCriteria,
        numbers: Sequence[int],
        expected_lengths: Sequence[int] | None = None,
    ) -> None:
        """`numbers` name the random streams of the prompts. `expected_lengths` are those of their completions, by
        default all equal; they decide the order of the sequences and nothing else."""
        self.prompts = prompts
        self.n = n
        self.sampling = sampling
        self.stops = stops
        self.numbers = numbers
        self.expected_lengths = expected_lengths or [0] * len(prompts)
        self.unfinished = [list(range(n)) for _ in prompts]
        """The samples of each prompt that have not ended."""
        if sampling.max_new_tokens < 1:
            self.unfinished.clear()
        self.spent_tokens = 0
        """Tokens of the sequences that have ended."""
        self.tokens_streamed = False

    def start(self, slots: int) -> None:
        """Queues all sequences that have not ended, from their beginning. Called again after an attempt that failed."""
        self.token_budget = math.inf
        if self.sampling.budget is not None:
            self.token_budget = self.sampling.budget - self.spent_tokens
        self.prefilled = deque[_PrefilledPrompt]()
        self.rows = list[SequenceState | None]()
        """The sequence in each slot."""
        self.set_slots(slots, slots)

    def set_slots(self, slots: int, unshared_slots: int) -> None:
        """Sets the number of slots, before any prompt is read, and orders the waiting prompts for it. Memory is
        sufficient for `unshared_slots` sequences that share nothing with others."""
        self.slots = slots
        self.unshared_slots = unshared_slots
        self.waiting = deque(self._prompt_order())

    @property
    def num_unfinished(self) -> int:
        return sum(len(samples) for samples in self.unfinished)

    @property
    def columns(self) -> int:
        """Tokens that the longest sequence may have."""
        return max(map(len, self.prompts)) + self.sampling.max_new_tokens

    @property
    def is_done(self) -> bool:
        return not (self.num_running or self.prefilled or self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.decoding())

    @property
    def is_out_of_budget(self) -> bool:
        """Whether the token budget is too small for one more step."""
        return self.token_budget < max(1, self.num_running)

    def decoding(self) -> list[SequenceState]:
        """Returns the sequences that have slots, in the order of the slots."""
        return [row for row in self.rows if row is not None]

    def next_prompts(self) -> list[int]:
        """Returns the prompts to read now: for the free slots, and for some that will be free later, because prompts
        are read faster together."""
        num_free = len(self._free_slots())
        chosen = list[int]()
        if not num_free or self.prefilled:
            return chosen
        # A prompt that was read and waits takes as many bytes as one that nothing shares.
        limit = max_prefill_prompts(min(num_free, self.unshared_slots), self.n, self.unshared_slots)
        width = 0
        while self.waiting and len(chosen) < limit:
            width = max(width, len(self.prompts[self.waiting[0]]))
            if chosen and width * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            chosen.append(self.waiting.popleft())
        return chosen

    def add_prefilled(
        self,
        prompts: Sequence[int],
        cache: Any,
    ) -> list[SequenceState]:
        """Takes over prompts that were read, row i of `cache` for prompts[i]. Returns all their samples, whose first
        tokens must be appended now. A token counts toward the budget when its sequence takes a slot."""
        sequences = []
        for cache_row, prompt in enumerate(prompts):
            group = [self._new_sequence(prompt, sample) for sample in self.unfinished[prompt]]
            self.prefilled.append(_PrefilledPrompt(deque(group), cache, cache_row))
            sequences += group
        return sequences

    def admit(self, room: Callable[[Any, int], int]) -> Iterator[Placement]:
        """Assigns waiting samples to free slots, of each prompt as many as `room(cache, cache_row)` returns. Yields the
        slots of a prompt, which must be filled before those of the next one are assigned."""
        free = self._free_slots()
        while self.prefilled and free:
            prompt = self.prefilled[0]
            slots = free[: min(len(prompt.samples), room(prompt.cache, prompt.cache_row))]
            if not slots:
                return
            free = free[len(slots) :]
            for slot in slots:
                # A slot at the end of the list appends.
                self.rows[slot : slot + 1] = [prompt.samples.popleft()]
            yield Placement(prompt.cache, prompt.cache_row, slots)
            if not prompt.samples:
                self.prefilled.popleft()

    def compact(self) -> list[SlotMove]:
        """Moves the last sequences into the free slots, because a step reads the first slots only. Returns the moves in
        the order in which they must be made."""
        moves = []
        while None in self.rows:
            last = self.rows.pop()
            if last is not None:
                target = self.rows.index(None)
                moves.append(SlotMove(len(self.rows), target, last.length))
                self.rows[target] = last
        return moves

    def append_drawn(
        self,
        sequences: Sequence[SequenceState],
        drawn: Sequence[Sequence[float]],
    ) -> list[int]:
        """Appends a token and its log-prob to each of the sequences in the first slots that has not ended. Returns
        their slots."""
        slots = []
        for slot, (sequence, (token, logp)) in enumerate(zip(sequences, drawn, strict=True)):
            if self.rows[slot] is sequence:
                sequence.length += 1
                sequence.append(token, logp)
                slots.append(slot)
        return slots

    def last_tokens(self, slots: Sequence[int]) -> list[Token]:
        """Returns the last token in each of these slots, for a caller that streams them."""
        self.tokens_streamed = True
        tokens = []
        for slot in slots:
            row = self.rows[slot]
            if row is not None:
                tokens.append(Token(row.prompt, row.sample, row.token_ids[-1]))
        return tokens

    def retire(self, slots: Sequence[int]) -> list[Completion]:
        """Counts one new token in each of these slots, frees the slots whose sequence ends with it, and returns their
        completions."""
        self.token_budget -= len(slots)
        finished = []
        for slot in slots:
            row = self.rows[slot]
            if row is None:
                continue
            finish_reason = self.stops.finish_reason(row.token_ids)
            if finish_reason is not None:
                finished.append(row.to_completion(finish_reason))
                self.rows[slot] = None
                self.unfinished[row.prompt].remove(row.sample)
                self.spent_tokens += len(row.token_ids)
        return finished

    def ended_slots(self) -> list[int]:
        """Returns the slots whose sequence has ended and that no other has taken."""
        return [slot for slot, row in enumerate(self.rows) if row is None]

    def truncate_all(self) -> list[Completion]:
        """Ends every sequence where it is. Those that have no slot yet end with no tokens."""
        completions = [row.to_completion("budget") for row in self.decoding()]
        not_started = []
        for prefilled in self.prefilled:
            not_started += [(row.prompt, row.sample) for row in prefilled.samples]
        for prompt in self.waiting:
            not_started += [(prompt, sample) for sample in self.unfinished[prompt]]
        for prompt, sample in not_started:
            completions.append(
                Completion(
                    prompt,
                    sample,
                    [],
                    "budget",
                    [],
                )
            )
        self.unfinished.clear()
        self.start(self.slots)
        return completions

    def _prompt_order(self) -> list[int]:
        """Returns the prompts with sequences that have not ended: the longest expected first, because a rollout lasts
        until its last sequence ends. The order of the prompts that start at once changes nothing, so these are ordered
        by their own length: prompts of similar length are then read together."""
        waiting = [prompt for prompt, samples in enumerate(self.unfinished) if samples]
        waiting.sort(key=self._prompt_length)
        waiting.sort(key=self._expected_length, reverse=True)
        free = self.slots
        num_first = 0
        for prompt in waiting:
            free -= len(self.unfinished[prompt])
            if free < 0:
                break
            num_first += 1
        return sorted(waiting[:num_first], key=self._prompt_length) + waiting[num_first:]

    def _prompt_length(self, prompt: int) -> int:
        return len(self.prompts[prompt])

    def _expected_length(self, prompt: int) -> int:
        return self.expected_lengths[prompt]

    def _free_slots(self) -> list[int]:
        """Returns the free slots in order, no more than the token budget has tokens for."""
        free = self.ended_slots()
        free += range(len(self.rows), self.slots)
        affordable = min(self.token_budget - self.num_running, len(free))
        return free[: int(affordable)]

    def _new_sequence(
        self,
        prompt: int,
        sample: int,
    ) -> SequenceState:
        generator = sequence_generator(self.sampling.seed, self.numbers[prompt], sample)
        return SequenceState(
            prompt,
            sample,
            len(self.prompts[prompt]),
            uniform_stream(generator),
        )


def max_prefill_prompts(
    free: int,
    n: int,
    slots: int,
) -> int:
    """Returns how many prompts with `n` samples are read at once for `free` of `slots` slots. Samples that wait for a
    slot take no more than a quarter of the slots."""
    return max(-(-free // n), slots // 4)


def sequence_generator(
    seed: int,
    prompt: int,
    sample: int,
) -> torch.Generator:
    """Returns the random generator of one sequence, which depends on nothing else in the batch."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def uniform_stream(generator: torch.Generator) -> Iterator[float]:
    """Yields uniform random numbers in [0, 1), in float64."""
    while True:
        yield from torch.rand(
            UNIFORMS_PER_BLOCK,
            generator=generator,
            dtype=torch.float64,
        ).tolist()
