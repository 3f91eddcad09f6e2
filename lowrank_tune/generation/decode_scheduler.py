"""Which sequence speaks when: prompts are read, their samples take slots, and those that end make room at once."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_tune.errors import TrainingError
from lowrank_tune.generation.kv_cache import KVStore
from lowrank_tune.generation.outputs import Completion, Token
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.stopping import StoppingCriteria

UNIFORMS_PER_BLOCK = 64  # numbers that a stream is asked for at a time
PREFILL_TOKENS = 4096  # of prompts read in one forward pass, with padding

SampleFn = Callable[[Tensor, list[float]], list[list[float]]]
"""Hidden states (N, d) and a uniform number for each -> a token and its log-prob for each."""


@dataclass
class _Row:
    """A sequence in a slot: `length` tokens of it are read, its last one is not."""

    prompt: int
    sample: int
    length: int
    uniforms: Iterator[float]
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    def to_completion(self, finish_reason: Literal["stop", "length", "budget"]) -> Completion:
        return Completion(self.prompt, self.sample, self.token_ids, finish_reason, self.logps)


@dataclass
class _PrefilledPrompt:
    """A prompt that was read: its samples, which have said their first token and wait for slots, what the store places,
    its row there."""

    samples: deque[_Row]
    cache: Any
    row: int


class DecodeScheduler:
    """The sequences of one call. `run_until_any_finished` goes on until some of them end, `step_tokens` for one
    turn."""

    def __init__(
        self,
        store: KVStore,
        sample_fn: SampleFn,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        slots: int,
        numbers: Sequence[int],
        ended: Collection[tuple[int, int]] = (),
        spent: int = 0,
    ) -> None:
        """`ended` are samples of prompts that need not be drawn any more, `spent` the tokens of them."""
        self.store = store
        self.sample_fn = sample_fn
        self.prompts = prompts
        self.n = n
        self.seed = sampling.seed
        self.slots = slots
        self.numbers = numbers
        if sampling.budget is None:
            self.token_budget = math.inf
        else:
            self.token_budget = sampling.budget - spent
        self.samples = [
            [sample for sample in range(n) if (prompt, sample) not in ended] for prompt in range(len(prompts))
        ]
        # Prompts of similar length are read together.
        self.waiting = deque(
            sorted((i for i, samples in enumerate(self.samples) if samples), key=lambda index: len(prompts[index]))
        )
        self.prefilled = deque[_PrefilledPrompt]()
        self.rows: list[_Row | None] = []
        self.last_stepped: list[_Row] = []
        """The sequences that the last turn gave a token, which is the last of their ids."""

    @property
    def is_done(self) -> bool:
        return not (self.running or self.prefilled or self.waiting)

    @property
    def running(self) -> int:
        return sum(row is not None for row in self.rows)

    def run_until_any_finished(self, stops: StoppingCriteria) -> list[Completion]:
        """One turn after another, until at least one sequence has ended."""
        finished: list[Completion] = []
        while not finished and not self.is_done:
            finished = self.step(stops)
        return finished

    def step(self, stops: StoppingCriteria) -> list[Completion]:
        """Admits, or makes one step; the sequences that ended with it."""
        if self.token_budget < max(1, self.running):
            return self._truncate_all()
        slots = self._admit()
        if not slots:
            self._compact_slots()
            slots = self._decode_step()
        self.last_stepped = [row for slot in slots if (row := self.rows[slot]) is not None]
        self.token_budget -= len(self.last_stepped)
        return self._finish_rows(slots, stops)

    def step_tokens(self, stops: StoppingCriteria) -> list[Token | Completion]:
        """One turn: the tokens that it drew, and the sequences that ended with them."""
        finished = self.step(stops)
        return [*(Token(row.prompt, row.sample, row.token_ids[-1]) for row in self.last_stepped), *finished]

    def _admit(self) -> list[int]:
        """Puts waiting sequences into free slots. The slots taken."""
        free = [slot for slot, row in enumerate(self.rows) if row is None] + list(range(len(self.rows), self.slots))
        free = free[: int(min(self.token_budget - self.running, len(free)))]
        if not free or not (self.prefilled or self.waiting):
            return []
        if not self.prefilled:
            self._prefill_next(len(free))
        taken: list[int] = []
        while self.prefilled and len(taken) < len(free):
            prefilled_prompt = self.prefilled[0]
            assigned_slots = free[len(taken) : len(taken) + len(prefilled_prompt.samples)]
            self.store.insert(prefilled_prompt.cache, [prefilled_prompt.row] * len(assigned_slots), assigned_slots)
            for slot in assigned_slots:
                self.rows[slot : slot + 1] = [prefilled_prompt.samples.popleft()]
            taken += assigned_slots
            if not prefilled_prompt.samples:
                self.prefilled.popleft()
        return taken

    def _prefill_next(self, free: int) -> None:
        """Reads the next prompts, for the free slots and for some that will be free later: together they are read
        faster.

        All their samples say their first tokens at once, too: a token is counted when its sequence takes a slot.
        """
        # prompts: what waits takes no more than a quarter of the slots
        max_prompts = max(-(-free // self.n), self.slots // 4)
        width = 0
        chosen: list[int] = []
        while self.waiting and len(chosen) < max_prompts:
            width = max(width, len(self.prompts[self.waiting[0]]))
            if chosen and width * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            chosen.append(self.waiting.popleft())
        cache, hidden = self.store.prefill([self.prompts[index] for index in chosen])
        groups = [[self._new_row(index, sample) for sample in self.samples[index]] for index in chosen]
        row_index = torch.tensor([row for row, group in enumerate(groups) for _ in group], device=hidden.device)
        self._append_tokens([one for group in groups for one in group], hidden[row_index])
        self.prefilled += [_PrefilledPrompt(deque(group), cache, row) for row, group in enumerate(groups)]

    def _new_row(self, prompt: int, sample: int) -> _Row:
        return _Row(
            prompt,
            sample,
            len(self.prompts[prompt]),
            _uniforms(_generator(self.seed, self.numbers[prompt], sample)),
        )

    def _compact_slots(self) -> None:
        """The last sequences move into the slots that were left: a step reads the first slots only."""
        while None in self.rows:
            last = self.rows.pop()
            if last is not None:
                hole = self.rows.index(None)
                self.store.move(len(self.rows), hole, last.length)
                self.rows[hole] = last

    def _decode_step(self) -> list[int]:
        rows = [row for row in self.rows if row is not None]
        hidden = self.store.step([row.token_ids[-1] for row in rows], [row.length for row in rows])
        for row in rows:
            row.length += 1
        self._append_tokens(rows, hidden)
        return list(range(len(rows)))

    def _append_tokens(self, rows: Sequence[_Row], hidden: Tensor) -> None:
        """What these sequences say next."""
        for row, (token, logp) in zip(rows, self.sample_fn(hidden, [next(row.uniforms) for row in rows]), strict=True):
            if logp != logp:
                raise TrainingError(
                    "the logits of a completion are not finite: the training of its adapter has diverged"
                )
            row.token_ids.append(int(token))
            row.logps.append(logp)

    def _finish_rows(self, slots: Sequence[int], stops: StoppingCriteria) -> list[Completion]:
        finished = []
        for slot in slots:
            row = self.rows[slot]
            if row is not None and (finish_reason := stops.finish_reason(row.token_ids)) is not None:
                finished.append(row.to_completion(finish_reason))
                self.rows[slot] = None
        return finished

    def _truncate_all(self) -> list[Completion]:
        """Everything ends where it is, what has not begun too."""
        started = [row.to_completion("budget") for row in self.rows if row is not None]
        not_started = [
            (row.prompt, row.sample) for prefilled_prompt in self.prefilled for row in prefilled_prompt.samples
        ]
        not_started += [(prompt, sample) for prompt in self.waiting for sample in self.samples[prompt]]
        self.rows = []
        self.prefilled = deque()
        self.waiting = deque()
        self.last_stepped = []
        return started + [Completion(prompt, sample, [], "budget", []) for prompt, sample in not_started]


def _generator(seed: int, prompt: int, sample: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _uniforms(generator: torch.Generator) -> Iterator[float]:
    while True:
        yield from torch.rand(UNIFORMS_PER_BLOCK, generator=generator, dtype=torch.float64).tolist()
