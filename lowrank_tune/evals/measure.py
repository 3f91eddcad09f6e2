"""The measurement: every voice answers the same questions with the same random streams, a part of the questions at a
time.

The parts are drawn at random, and each is finished by all voices before the next begins: whenever a person interrupts,
what was measured is a fair sample, and the same one for all. Neither the parts nor their order change any answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lowrank_tune.data import Template, collate
from lowrank_tune.evals.marking import Mark, Marking
from lowrank_tune.evals.questions import Question
from lowrank_tune.evals.subject import role_of
from lowrank_tune.events import Emit, Progress
from lowrank_tune.model.roles import Roles
from lowrank_tune.rollout import Engine
from lowrank_tune.types import Row, Sampling

ANSWERS = 512  # of a part, about: enough to keep the engine busy
MICRO_TOKENS = 1 << 14


@dataclass(frozen=True)
class Loss:
    """Of one reference answer: the sum of -log p of its tokens in nats, and how many they are."""

    total: float
    tokens: int


@dataclass
class Measured:
    """Of each voice what it answered to each question that is `done`, and its loss there; questions by number."""

    voices: list[str]
    questions: list[Question]
    marks: dict[str, dict[int, list[Mark]]] = field(default_factory=dict)
    losses: dict[str, dict[int, Loss]] = field(default_factory=dict)
    done: list[int] = field(default_factory=list)
    interrupted: bool = False


class Meter:
    """Measures voices over one base. `answering` False leaves answers out: nothing could be told of them."""

    def __init__(
        self,
        roles: Roles,
        template: Template,
        marking: Marking,
        sampling: Sampling,
        samples: int,
        answering: bool,
        emit: Emit,
    ) -> None:
        self.roles, self.template, self.marking, self.sampling = roles, template, marking, sampling
        self.samples, self.answering, self.emit = samples, answering, emit

    def measure(self, voices: Sequence[str], questions: Sequence[Question], seed: int) -> Measured:
        """Ctrl-C ends it with the parts that all voices have finished."""
        found = Measured(
            list(voices), list(questions), {voice: {} for voice in voices}, {voice: {} for voice in voices}
        )
        order = list(questions)
        random.Random(f"eval-{seed}").shuffle(order)
        each = max(1, ANSWERS // (self.samples if self.answering else 1))
        count = -(-len(order) // each)
        parts = [order[number * len(order) // count : (number + 1) * len(order) // count] for number in range(count)]
        work = sum(self._work(part) for part in parts) * len(voices)
        bar = _Bar(f"evaluating {', '.join(voices)}", work, self.emit)
        try:
            for part in parts:
                self._part(found, part, bar)
        except KeyboardInterrupt:
            found.interrupted = True
        return found

    def _work(self, part: Sequence[Question]) -> int:
        return len(part) * (self.samples if self.answering else 0) + sum(one.reference is not None for one in part)

    def _part(self, found: Measured, part: Sequence[Question], bar: _Bar) -> None:
        """All voices on some questions; nothing of it is kept unless all of it is."""
        losses = {voice: self._losses(voice, part, bar.more) for voice in found.voices}
        marks = {voice: self._answers(voice, part, bar.more) for voice in found.voices if self.answering}
        for voice in found.voices:
            found.losses[voice] |= losses[voice]
            found.marks[voice] |= marks.get(voice, {})
        found.done += [one.number for one in part]

    def _losses(self, voice: str, part: Sequence[Question], tell: Callable[[int], None]) -> dict[int, Loss]:
        waiting = sorted(
            ((one.number, one.reference) for one in part if one.reference is not None),
            key=lambda each: -len(each[1].ids),
        )
        found: dict[int, Loss] = {}
        while waiting:
            count = max(1, MICRO_TOKENS // len(waiting[0][1].ids))
            some, waiting = waiting[:count], waiting[count:]
            rows: list[Row] = [row for _, row in some]
            batch = collate(rows, self.template.pad_id).to(self.roles.base.device)
            with self.roles.quiet():
                logps = self.roles.logps(role_of(voice), batch).logps.double().sum(dim=1)
            counts = batch.scored.sum(dim=1)
            for (number, _), total, tokens in zip(some, logps.tolist(), counts.tolist(), strict=True):
                found[number] = Loss(-total, int(tokens))
            tell(len(some))
        return found

    def _answers(self, voice: str, part: Sequence[Question], tell: Callable[[int], None]) -> dict[int, list[Mark]]:
        engine = Engine(self.roles, role_of(voice))
        numbers = [one.number for one in part]
        for completion in engine.generate([one.ids for one in part], self.samples, self.sampling, numbers):
            question = part[completion.prompt]
            self.marking.submit((question.number, completion.sample), question, completion)
            tell(1)
        marks: dict[int, list[Mark]] = {number: [] for number in numbers}
        for (number, _), mark in sorted(self.marking.collect().items(), key=lambda each: each[0]):
            marks[number].append(mark)
        return marks


class _Bar:
    """Tells how far all of it is, at most two hundred times."""

    def __init__(self, what: str, total: int, emit: Emit) -> None:
        self.what, self.total, self.emit, self.done = what, total, emit, 0
        if total:
            emit(Progress(what=what, done=0, total=total))

    def more(self, count: int) -> None:
        before, self.done = self.done, self.done + count
        if self.done * 200 // self.total != before * 200 // self.total:
            self.emit(Progress(what=self.what, done=self.done, total=self.total))
