"""Answers to held-out questions during a training run."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.data import ChatTemplate
from lowrank_tune.evaluation.grading import GradedAnswer, grade_answer
from lowrank_tune.evaluation.questions import EvalQuestion
from lowrank_tune.events import Emit, ProgressBar
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles


def generate_answers(
    roles: Roles,
    role: str,
    template: ChatTemplate,
    questions: Sequence[EvalQuestion],
    num_samples: int,
    sampling: SamplingParams,
    emit: Emit,
) -> list[list[GradedAnswer]]:
    """Returns `num_samples` answers to each question, graded by its gold answer."""
    answers: list[list[GradedAnswer]] = [[] for _ in questions]
    prompts = [question.prompt_ids for question in questions]
    bar = ProgressBar(f"answering held-out questions ({role})", len(questions) * num_samples, emit)
    for completion in Engine(roles, role).generate(prompts, num_samples, sampling):
        question = questions[completion.prompt]
        answers[completion.prompt].append(grade_answer(completion, question, template))
        bar.advance()
    return answers


def heldout_metrics(answers: Sequence[Sequence[GradedAnswer]]) -> dict[str, float]:
    """Returns `accuracy` (pass@1 by the gold answer), `eos_rate`, `mean_length`, and pass@k of k samples per prompt."""
    num_samples = len(answers[0])
    flat = [answer for prompt_answers in answers for answer in prompt_answers]
    metrics = {
        "accuracy": sum(answer.right is True for answer in flat) / len(flat),
        "eos_rate": sum(answer.stopped for answer in flat) / len(flat),
        "mean_length": sum(answer.tokens for answer in flat) / len(flat),
    }
    if num_samples > 1:
        solved = [any(answer.right for answer in prompt_answers) for prompt_answers in answers]
        metrics[f"pass_at_{num_samples}"] = sum(solved) / len(answers)
    return metrics
