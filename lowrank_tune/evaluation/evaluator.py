"""The measurement: every variant answers the same questions with the same random streams, a part of the questions at a
time.

The parts are drawn at random, and each is finished by all variants before the next begins: after an interruption,
what was measured is a fair sample, and the same one for all. Neither the parts nor their order change any answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lowrank_tune.batch import Row
from lowrank_tune.data import ChatTemplate, collate
from lowrank_tune.evaluation.grading import GradedAnswer, Grader
from lowrank_tune.evaluation.questions import EvalQuestion
from lowrank_tune.evaluation.target import role_of
from lowrank_tune.events import Emit, Progress
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles

ANSWERS_PER_BATCH = 512  # of a part, about: enough to keep the engine busy
MICRO_TOKENS = 1 << 14


@dataclass(frozen=True)
class ReferenceLoss:
    """Of one reference answer: the sum of -log p of its tokens in nats, and how many they are."""

    nll_sum: float
    tokens: int


@dataclass
class EvalResult:
    """Of each variant what it answered to each question that is `done`, and its loss there; questions by number."""

    variants: list[str]
    questions: list[EvalQuestion]
    answers: dict[str, dict[int, list[GradedAnswer]]] = field(default_factory=dict)
    losses: dict[str, dict[int, ReferenceLoss]] = field(default_factory=dict)
    done: list[int] = field(default_factory=list)
    interrupted: bool = False


class Evaluator:
    """Measures variants over one base. `answering` False leaves answers out: nothing could be told of them."""

    def __init__(
        self,
        roles: Roles,
        template: ChatTemplate,
        grader: Grader,
        sampling: SamplingParams,
        samples: int,
        answering: bool,
        emit: Emit,
    ) -> None:
        self.roles = roles
        self.template = template
        self.grader = grader
        self.sampling = sampling
        self.samples = samples
        self.answering = answering
        self.emit = emit

    def measure(self, variants: Sequence[str], questions: Sequence[EvalQuestion], seed: int) -> EvalResult:
        """Ctrl-C ends it with the parts that all variants have finished."""
        result = EvalResult(
            list(variants),
            list(questions),
            {variant: {} for variant in variants},
            {variant: {} for variant in variants},
        )
        order = list(questions)
        random.Random(f"eval-{seed}").shuffle(order)
        part_size = max(1, ANSWERS_PER_BATCH // (self.samples if self.answering else 1))
        count = -(-len(order) // part_size)
        parts = [order[number * len(order) // count : (number + 1) * len(order) // count] for number in range(count)]
        work = sum(self._count_work(part) for part in parts) * len(variants)
        bar = _ProgressBar(f"evaluating {', '.join(variants)}", work, self.emit)
        try:
            for part in parts:
                self._run_batch(result, part, bar)
        except KeyboardInterrupt:
            result.interrupted = True
        return result

    def _count_work(self, part: Sequence[EvalQuestion]) -> int:
        return len(part) * (self.samples if self.answering else 0) + sum(
            question.reference is not None for question in part
        )

    def _run_batch(self, result: EvalResult, part: Sequence[EvalQuestion], bar: _ProgressBar) -> None:
        """All variants on some questions; nothing of it is kept unless all of it is."""
        losses = {variant: self._losses(variant, part, bar.advance) for variant in result.variants}
        answers = {variant: self._answers(variant, part, bar.advance) for variant in result.variants if self.answering}
        for variant in result.variants:
            result.losses[variant] |= losses[variant]
            result.answers[variant] |= answers.get(variant, {})
        result.done += [question.number for question in part]

    def _losses(
        self,
        variant: str,
        part: Sequence[EvalQuestion],
        on_progress: Callable[[int], None],
    ) -> dict[int, ReferenceLoss]:
        waiting = sorted(
            ((question.number, question.reference) for question in part if question.reference is not None),
            key=lambda entry: -len(entry[1].input_ids),
        )
        losses: dict[int, ReferenceLoss] = {}
        while waiting:
            count = max(1, MICRO_TOKENS // len(waiting[0][1].input_ids))
            some = waiting[:count]
            waiting = waiting[count:]
            rows: list[Row] = [row for _, row in some]
            batch = collate(rows, self.template.pad_id).to(self.roles.base.device)
            with self.roles.inference_mode():
                logps = self.roles.logps(role_of(variant), batch).logps.double().sum(dim=1)
            counts = batch.loss_mask.sum(dim=1)
            for (number, _), total, tokens in zip(some, logps.tolist(), counts.tolist(), strict=True):
                losses[number] = ReferenceLoss(-total, int(tokens))
            on_progress(len(some))
        return losses

    def _answers(
        self,
        variant: str,
        part: Sequence[EvalQuestion],
        on_progress: Callable[[int], None],
    ) -> dict[int, list[GradedAnswer]]:
        engine = Engine(self.roles, role_of(variant))
        numbers = [eval_question.number for eval_question in part]
        for completion in engine.generate(
            [eval_question.prompt_ids for eval_question in part],
            self.samples,
            self.sampling,
            numbers,
        ):
            question = part[completion.prompt]
            self.grader.submit((question.number, completion.sample), question, completion)
            on_progress(1)
        answers: dict[int, list[GradedAnswer]] = {number: [] for number in numbers}
        for (number, _), answer in sorted(self.grader.collect().items(), key=lambda entry: entry[0]):
            answers[number].append(answer)
        return answers


class _ProgressBar:
    """Tells how far all of it is, at most two hundred times."""

    def __init__(self, label: str, total: int, emit: Emit) -> None:
        self.label = label
        self.total = total
        self.emit = emit
        self.done = 0
        if total:
            emit(Progress(description=label, done=0, total=total))

    def advance(self, count: int) -> None:
        before = self.done
        self.done = self.done + count
        if self.done * 200 // self.total != before * 200 // self.total:
            self.emit(Progress(description=self.label, done=self.done, total=self.total))
