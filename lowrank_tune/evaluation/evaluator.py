"""Answers and losses of every variant on the same questions with the same random streams, one part of the questions at
a time.

The parts are drawn at random, and all variants finish a part before the next one begins. After an interruption the
finished parts are a random sample of the questions, the same one for all variants. Neither the parts nor their order
change an answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowrank_tune.batch import Row
from lowrank_tune.data import ChatTemplate, collate
from lowrank_tune.evaluation.grading import MICRO_TOKENS, GradedAnswer, Grader
from lowrank_tune.evaluation.questions import EvalQuestion
from lowrank_tune.evaluation.target import role_of
from lowrank_tune.events import Emit, ProgressBar
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles

ANSWERS_PER_BATCH = 512
"""Answers in a part, about: enough to keep the engine busy."""
PROGRESS_UPDATES = 200


@dataclass(frozen=True)
class ReferenceLoss:
    """Loss of one reference answer: the sum of -log p of its tokens in nats, and their number."""

    nll_sum: float
    tokens: int


@dataclass
class EvalResult:
    """Answers and losses of each variant by the number of the question; `done` are the numbers of the finished
    questions."""

    variants: list[str]
    questions: list[EvalQuestion]
    answers: dict[str, dict[int, list[GradedAnswer]]] = field(default_factory=dict)
    losses: dict[str, dict[int, ReferenceLoss]] = field(default_factory=dict)
    done: list[int] = field(default_factory=list)
    interrupted: bool = False


@dataclass
class Evaluator:
    """Evaluates variants over one base. `samples` is the number of answers per question, 0 for losses alone."""

    roles: Roles
    template: ChatTemplate
    grader: Grader
    sampling: SamplingParams
    samples: int
    emit: Emit

    def measure(
        self,
        variants: Sequence[str],
        questions: Sequence[EvalQuestion],
        seed: int,
    ) -> EvalResult:
        """Returns answers and losses of all variants, after Ctrl-C those of the parts that all variants have
        finished."""
        result = EvalResult(list(variants), list(questions))
        for variant in variants:
            result.answers[variant] = {}
            result.losses[variant] = {}
        parts = self._split_questions(questions, seed)
        units = sum(self._count_units(part) for part in parts) * len(variants)
        bar = ProgressBar(
            f"evaluating {', '.join(variants)}",
            units,
            self.emit,
            PROGRESS_UPDATES,
        )
        if units:
            bar.report()
        try:
            for part in parts:
                self._run_part(result, part, bar)
        except KeyboardInterrupt:
            result.interrupted = True
        return result

    def _split_questions(
        self,
        questions: Sequence[EvalQuestion],
        seed: int,
    ) -> list[list[EvalQuestion]]:
        """Shuffles the questions and splits them into parts of about equal size."""
        order = list(questions)
        random.Random(f"eval-{seed}").shuffle(order)
        part_size = max(1, ANSWERS_PER_BATCH // max(1, self.samples))
        num_parts = -(-len(order) // part_size)
        parts = []
        for number in range(num_parts):
            start = number * len(order) // num_parts
            end = (number + 1) * len(order) // num_parts
            parts.append(order[start:end])
        return parts

    def _count_units(self, part: Sequence[EvalQuestion]) -> int:
        """Returns the number of answers and losses of a part."""
        references = sum(question.reference is not None for question in part)
        return len(part) * self.samples + references

    def _run_part(
        self,
        result: EvalResult,
        part: Sequence[EvalQuestion],
        bar: ProgressBar,
    ) -> None:
        """Evaluates all variants on some questions; the result is updated after all of them."""
        losses = {variant: self._losses(variant, part, bar) for variant in result.variants}
        answers: dict[str, dict[int, list[GradedAnswer]]] = {}
        if self.samples:
            answers = {variant: self._answers(variant, part, bar) for variant in result.variants}
        for variant in result.variants:
            result.losses[variant] |= losses[variant]
            result.answers[variant] |= answers.get(variant, {})
        result.done += [question.number for question in part]

    def _losses(
        self,
        variant: str,
        part: Sequence[EvalQuestion],
        bar: ProgressBar,
    ) -> dict[int, ReferenceLoss]:
        """Returns the losses of the reference answers, in batches of similar length."""
        references = []
        for question in part:
            if question.reference is not None:
                references.append((question.number, question.reference))
        references.sort(key=lambda entry: -len(entry[1].input_ids))
        losses: dict[int, ReferenceLoss] = {}
        while references:
            _, longest = references[0]
            count = max(1, MICRO_TOKENS // len(longest.input_ids))
            rows = [row for _, row in references[:count]]
            row_losses = self._row_losses(variant, rows)
            for (number, _), loss in zip(references[:count], row_losses, strict=True):
                losses[number] = loss
            references = references[count:]
            bar.advance(len(rows))
        return losses

    def _row_losses(
        self,
        variant: str,
        rows: list[Row],
    ) -> list[ReferenceLoss]:
        batch = collate(rows, self.template.pad_id).to(self.roles.base.device)
        with self.roles.inference_mode():
            logps = self.roles.logps(role_of(variant), batch).logps.double().sum(dim=1).tolist()
        counts = batch.on_cpu.loss_mask.sum(dim=1).tolist()
        return [ReferenceLoss(-total, int(tokens)) for total, tokens in zip(logps, counts, strict=True)]

    def _answers(
        self,
        variant: str,
        part: Sequence[EvalQuestion],
        bar: ProgressBar,
    ) -> dict[int, list[GradedAnswer]]:
        """Returns the graded answers by the number of their question, in the order of the samples."""
        engine = Engine(self.roles, role_of(variant))
        prompts = [question.prompt_ids for question in part]
        numbers = [question.number for question in part]
        for completion in engine.generate(prompts, self.samples, self.sampling, numbers):
            question = part[completion.prompt]
            self.grader.submit((question.number, completion.sample), question, completion)
            bar.advance()
        answers: dict[int, list[GradedAnswer]] = {number: [] for number in numbers}
        graded = self.grader.collect()
        for key in sorted(graded):
            number, _ = key
            answers[number].append(graded[key])
        return answers
