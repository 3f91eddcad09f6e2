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

from lowrank_tune.errors import RunFailed
from lowrank_tune.rollout.stop import Stops
from lowrank_tune.rollout.stores import Store
from lowrank_tune.types import Completion, Sampling, Token

DRAWS = 64  # numbers that a stream is asked for at a time
PREFILL_TOKENS = 4096  # of prompts read in one forward pass, with padding

Say = Callable[[Tensor, list[float]], list[list[float]]]
"""Hidden states (N, d) and a uniform number for each -> a token and its log-prob for each."""


@dataclass
class _Row:
    """A sequence in a slot: `length` tokens of it are read, its last one is not."""

    prompt: int
    sample: int
    length: int
    uniforms: Iterator[float]
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    def ended(self, finish: Literal["stop", "length", "budget"]) -> Completion:
        return Completion(self.prompt, self.sample, self.ids, finish, self.logps)


@dataclass
class _Read:
    """A prompt that was read: its samples, which have said their first token and wait for slots, what the store places,
    its row there."""

    samples: deque[_Row]
    kept: Any
    row: int


class Schedule:
    """The sequences of one call. `advance` goes on until some of them end, `tokens` for one turn."""

    def __init__(
        self,
        store: Store,
        say: Say,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        slots: int,
        numbers: Sequence[int],
        ended: Collection[tuple[int, int]] = (),
        spent: int = 0,
    ) -> None:
        """`ended` are samples of prompts that need not be drawn any more, `spent` the tokens of them."""
        self.store, self.say, self.prompts, self.n, self.seed, self.slots = store, say, prompts, n, sampling.seed, slots
        self.numbers = numbers
        self.room = math.inf if sampling.budget is None else sampling.budget - spent
        self.samples = [
            [sample for sample in range(n) if (prompt, sample) not in ended] for prompt in range(len(prompts))
        ]
        # Prompts of similar length are read together.
        self.waiting = deque(
            sorted((i for i, samples in enumerate(self.samples) if samples), key=lambda index: len(prompts[index]))
        )
        self.read = deque[_Read]()
        self.rows: list[_Row | None] = []
        self.spoke: list[_Row] = []
        """The sequences that the last turn gave a token, which is the last of their ids."""

    @property
    def over(self) -> bool:
        return not (self.speaking or self.read or self.waiting)

    @property
    def speaking(self) -> int:
        return sum(row is not None for row in self.rows)

    def advance(self, stops: Stops) -> list[Completion]:
        """One turn after another, until at least one sequence has ended."""
        finished: list[Completion] = []
        while not finished and not self.over:
            finished = self.turn(stops)
        return finished

    def turn(self, stops: Stops) -> list[Completion]:
        """Admits, or makes one step; the sequences that ended with it."""
        if self.room < max(1, self.speaking):
            return self._cut()
        slots = self._admit()
        if not slots:
            self._close_ranks()
            slots = self._step()
        self.spoke = [row for slot in slots if (row := self.rows[slot]) is not None]
        self.room -= len(self.spoke)
        return self._settle(slots, stops)

    def tokens(self, stops: Stops) -> list[Token | Completion]:
        """One turn: the tokens that it drew, and the sequences that ended with them."""
        finished = self.turn(stops)
        return [*(Token(row.prompt, row.sample, row.ids[-1]) for row in self.spoke), *finished]

    def _admit(self) -> list[int]:
        """Puts waiting sequences into free slots. The slots taken."""
        free = [slot for slot, row in enumerate(self.rows) if row is None] + list(range(len(self.rows), self.slots))
        free = free[: int(min(self.room - self.speaking, len(free)))]
        if not free or not (self.read or self.waiting):
            return []
        if not self.read:
            self._read_ahead(len(free))
        taken: list[int] = []
        while self.read and len(taken) < len(free):
            one = self.read[0]
            mine = free[len(taken) : len(taken) + len(one.samples)]
            self.store.place(one.kept, [one.row] * len(mine), mine)
            for slot in mine:
                self.rows[slot : slot + 1] = [one.samples.popleft()]
            taken += mine
            if not one.samples:
                self.read.popleft()
        return taken

    def _read_ahead(self, free: int) -> None:
        """Reads the next prompts, for the free slots and for some that will be free later: together they are read
        faster.

        All their samples say their first tokens at once, too: a token is counted when its sequence takes a slot.
        """
        # prompts: what waits takes no more than a quarter of the slots
        wanted, width = max(-(-free // self.n), self.slots // 4), 0
        chosen: list[int] = []
        while self.waiting and len(chosen) < wanted:
            width = max(width, len(self.prompts[self.waiting[0]]))
            if chosen and width * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            chosen.append(self.waiting.popleft())
        kept, hidden = self.store.read([self.prompts[index] for index in chosen])
        groups = [[self._begin(index, sample) for sample in self.samples[index]] for index in chosen]
        of = torch.tensor([row for row, group in enumerate(groups) for _ in group], device=hidden.device)
        self._hear([one for group in groups for one in group], hidden[of])
        self.read += [_Read(deque(group), kept, row) for row, group in enumerate(groups)]

    def _begin(self, prompt: int, sample: int) -> _Row:
        return _Row(
            prompt, sample, len(self.prompts[prompt]), _uniforms(_stream(self.seed, self.numbers[prompt], sample))
        )

    def _close_ranks(self) -> None:
        """The last sequences move into the slots that were left: a step reads the first slots only."""
        while None in self.rows:
            last = self.rows.pop()
            if last is not None:
                hole = self.rows.index(None)
                self.store.move(len(self.rows), hole, last.length)
                self.rows[hole] = last

    def _step(self) -> list[int]:
        rows = [row for row in self.rows if row is not None]
        hidden = self.store.step([row.ids[-1] for row in rows], [row.length for row in rows])
        for row in rows:
            row.length += 1
        self._hear(rows, hidden)
        return list(range(len(rows)))

    def _hear(self, rows: Sequence[_Row], hidden: Tensor) -> None:
        """What these sequences say next."""
        for row, (token, logp) in zip(rows, self.say(hidden, [next(row.uniforms) for row in rows]), strict=True):
            if logp != logp:
                raise RunFailed("the logits of a completion are not finite: the training of its adapter has diverged")
            row.ids.append(int(token))
            row.logps.append(logp)

    def _settle(self, slots: Sequence[int], stops: Stops) -> list[Completion]:
        finished = []
        for slot in slots:
            row = self.rows[slot]
            if row is not None and (finish := stops.finish(row.ids)) is not None:
                finished.append(row.ended(finish))
                self.rows[slot] = None
        return finished

    def _cut(self) -> list[Completion]:
        """Everything ends where it is, what has not begun too."""
        begun = [row.ended("budget") for row in self.rows if row is not None]
        unbegun = [(row.prompt, row.sample) for one in self.read for row in one.samples]
        unbegun += [(prompt, sample) for prompt in self.waiting for sample in self.samples[prompt]]
        self.rows, self.read, self.waiting, self.spoke = [], deque(), deque(), []
        return begun + [Completion(prompt, sample, [], "budget", []) for prompt, sample in unbegun]


def _stream(seed: int, prompt: int, sample: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _uniforms(stream: torch.Generator) -> Iterator[float]:
    while True:
        yield from torch.rand(DRAWS, generator=stream, dtype=torch.float64).tolist()
