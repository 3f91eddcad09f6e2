"""Sample completions of a stage: answers to a few held-out prompts, and scores of a few held-out pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_tune.assembly import RunComponents
from lowrank_tune.config import EvaluationConfig
from lowrank_tune.data import TokenizedDataset
from lowrank_tune.evaluation.heldout import generate_answers
from lowrank_tune.evaluation.questions import EvalQuestion, select_questions, split_row
from lowrank_tune.events import Emit, SampleLogged, ignore_event
from lowrank_tune.generation.sampling_params import SamplingParams


@dataclass
class SampleLogger:
    """Emits `SampleLogged` events.

    `questions` are the prompts whose answers are shown: the first held-out questions, or without such the first
    validation rows, as far as an answer fits the context of the base; none for a stage that trains no policy.
    """

    config: EvaluationConfig
    built: RunComponents
    heldout: list[EvalQuestion]
    emit: Emit

    def __post_init__(self) -> None:
        self.questions = self._shown_questions()

    def _shown_questions(self) -> list[EvalQuestion]:
        count = self.config.num_completions_to_print
        if "policy" not in self.built.trained:
            return []
        candidates = self.heldout
        if not candidates and self.built.validation is not None:
            candidates = select_questions(self.built.validation, self.built.template, count)
        limit = self.built.base.max_row_length
        if limit is None:
            return candidates[:count]
        max_prompt_length = limit - self.config.max_new_tokens
        fitting = [question for question in candidates if len(question.prompt_ids) <= max_prompt_length]
        return fitting[:count]

    def log_answers(self, role: str, step: int) -> None:
        """Emits one greedy answer of a role to each of the shown questions."""
        if not self.questions:
            return
        sampling = SamplingParams(
            self.config.max_new_tokens,
            self.built.stop_ids,
            temperature=0.0,
        )
        answers = generate_answers(
            self.built.roles,
            role,
            self.built.template,
            self.questions,
            1,
            sampling,
            ignore_event,
        )
        for samples in answers:
            answer = samples[0]
            question = self.questions[answer.prompt_index]
            event = SampleLogged(
                step=step,
                prompt=question.text,
                completion=answer.text,
                finish_reason="stop" if answer.stopped else "length",
                role=role,
                ground_truth=question.ground_truth,
            )
            self.emit(event)

    def log_pair_scores(self, rows: TokenizedDataset, step: int) -> None:
        """Emits both answers of the first held-out pairs with their scores."""
        units = np.arange(min(self.config.num_completions_to_print, rows.units))
        if not len(units):
            return
        device = self.built.base.device
        with self.built.roles.inference_mode():
            batch = self.built.validation_batch(rows.rows_of(units)).to(device)
            scores = self.built.algorithm.scores(batch).tolist()  # type: ignore[attr-defined]
        for index, score in enumerate(scores):
            prompt, completion = self._texts(rows, index)
            side = "chosen" if index % 2 == 0 else "rejected"
            self.emit(
                SampleLogged(
                    step=step,
                    prompt=prompt,
                    completion=completion,
                    finish_reason="stop",
                    role=side,
                    reward=score,
                )
            )

    def _texts(self, rows: TokenizedDataset, index: int) -> tuple[str, str]:
        """Returns prompt and completion of a row as text."""
        prompt_ids, completion_ids = split_row(rows[index])
        return self.built.template.decode(prompt_ids), self.built.template.decode(completion_ids)
