"""Answers to held-out prompts whose gold answer is known."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_tune.data import ChatTemplate, Prompt, TokenizedDataset
from lowrank_tune.events import Emit, Progress
from lowrank_tune.generation import Engine
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles

NUM_PROGRESS_UPDATES = 20  # times that a long job tells how far it is
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class HeldoutQuestion:
    """A held-out prompt as the model sees it and as a person reads it, and its gold answer where there is one."""

    prompt_ids: list[int]
    text: str
    ground_truth: str | None


@dataclass(frozen=True)
class HeldoutAnswer:
    """One answer to a held-out prompt. `stopped`: it ended by itself, within its turn; `exact`: it did, and it is the
    gold answer."""

    prompt_index: int
    text: str
    stopped: bool
    exact: bool
    length: int


def render_questions(prompts: Sequence[Prompt], template: ChatTemplate) -> list[HeldoutQuestion]:
    """Held-out prompts, rendered."""
    return [
        HeldoutQuestion(template.prompt(prompt.messages), prompt.messages[-1].content, prompt.ground_truth)
        for prompt in prompts
    ]


def select_questions(rows: TokenizedDataset, template: ChatTemplate, count: int) -> list[HeldoutQuestion]:
    """The first rows (of pairs, the chosen ones) of a validation part, each up to where the assistant first speaks."""
    questions = []
    for row in (rows[unit * rows.rows_per_unit] for unit in range(min(count, rows.units))):
        prompt_ids = [int(token) for token in row.input_ids[: list(row.completion_mask).index(True)]]
        questions.append(HeldoutQuestion(prompt_ids, template.decode(prompt_ids), None))
    return questions


def generate_answers(
    roles: Roles,
    role: str,
    template: ChatTemplate,
    questions: Sequence[HeldoutQuestion],
    num_samples: int,
    sampling: SamplingParams,
    emit: Emit,
    slots: int = 256,
) -> list[list[HeldoutAnswer]]:
    """`num_samples` answers to each question. One that ends by itself and holds no mark of another turn has stopped
    properly."""
    answers: list[list[HeldoutAnswer]] = [[] for _ in questions]
    total = len(questions) * num_samples
    for done, completion in enumerate(
        Engine(roles, role, slots).generate([question.prompt_ids for question in questions], num_samples, sampling), 1
    ):
        answers[completion.prompt].append(_grade(completion, template, questions[completion.prompt]))
        if done * NUM_PROGRESS_UPDATES // total != (done - 1) * NUM_PROGRESS_UPDATES // total:
            emit(Progress(description=f"answering held-out questions ({role})", done=done, total=total))
    return answers


def compute_metrics(answers: Sequence[Sequence[HeldoutAnswer]]) -> dict[str, float]:
    """pass@1 as the share of exact answers, pass@k for k samples a prompt, the share that stopped properly, and the
    mean length."""
    flat = [answer for prompt_answers in answers for answer in prompt_answers]
    num_samples = len(answers[0])
    metrics = {
        "accuracy": sum(answer.exact for answer in flat) / len(flat),
        "eos_rate": sum(answer.stopped for answer in flat) / len(flat),
        "mean_length": sum(answer.length for answer in flat) / len(flat),
    }
    if num_samples > 1:
        metrics[f"pass_at_{num_samples}"] = sum(
            any(answer.exact for answer in prompt_answers) for prompt_answers in answers
        ) / len(answers)
    return metrics


def is_exact(text: str, ground_truth: str) -> bool:
    """Whether an answer is the gold one: equal as numbers, its last number counting; or equal as text."""
    expected = _parse_float(ground_truth)
    if expected is None:
        return " ".join(text.split()).casefold().rstrip(".") == " ".join(ground_truth.split()).casefold().rstrip(".")
    numbers = NUMBER.findall(text)
    got = _parse_float(numbers[-1]) if numbers else None
    return got is not None and math.isclose(got, expected, rel_tol=0.0, abs_tol=1e-9)


def _parse_float(text: str) -> float | None:
    plain = text.strip().replace(",", "").rstrip(".")
    if len(plain) < 40 and re.fullmatch(r"-?\d+(?:\.\d+)?", plain):
        return float(plain)
    return None


def _grade(completion: Completion, template: ChatTemplate, question: HeldoutQuestion) -> HeldoutAnswer:
    if completion.finish_reason == "stop":
        body = completion.token_ids[:-1]
    else:
        body = completion.token_ids
    text = template.decode(body)
    stopped = completion.finish_reason == "stop" and not template.special_tokens_in(body)
    # what runs on and on has not answered
    exact = stopped and question.ground_truth is not None and is_exact(text, question.ground_truth)
    return HeldoutAnswer(completion.prompt, text, stopped, exact, len(completion.token_ids))
