"""Answers to held-out prompts whose gold answer is known."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_tune.data import Prompt, Template, TokenStore
from lowrank_tune.events import Emit, Progress
from lowrank_tune.model.roles import Roles
from lowrank_tune.rollout import Engine
from lowrank_tune.types import Completion, Sampling

TOLD = 20  # times that a long job tells how far it is
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """A held-out prompt as the model sees it and as a person reads it, and its gold answer where there is one."""

    ids: list[int]
    text: str
    gold: str | None


@dataclass(frozen=True)
class Answer:
    """One answer to a held-out prompt. `stopped`: it ended by itself, within its turn; `exact`: it did, and it is the
    gold answer."""

    prompt: int
    text: str
    stopped: bool
    exact: bool
    length: int


def questions_of(prompts: Sequence[Prompt], template: Template) -> list[Question]:
    """Held-out prompts, rendered."""
    return [Question(template.prompt(prompt.messages), prompt.messages[-1].content, prompt.gold) for prompt in prompts]


def questions_in(rows: TokenStore, template: Template, count: int) -> list[Question]:
    """The first rows (of pairs, the chosen ones) of a validation part, each up to where the assistant first speaks."""
    questions = []
    for row in (rows[unit * rows.together] for unit in range(min(count, rows.units))):
        ids = [int(token) for token in row.ids[: list(row.says).index(True)]]
        questions.append(Question(ids, template.decode(ids), None))
    return questions


def answer(
    roles: Roles,
    role: str,
    template: Template,
    questions: Sequence[Question],
    samples: int,
    sampling: Sampling,
    emit: Emit,
    slots: int = 256,
) -> list[list[Answer]]:
    """`samples` answers to each question. One that ends by itself and holds no mark of another turn has stopped
    properly."""
    answers: list[list[Answer]] = [[] for _ in questions]
    total = len(questions) * samples
    for done, completion in enumerate(
        Engine(roles, role, slots).generate([question.ids for question in questions], samples, sampling), 1
    ):
        answers[completion.prompt].append(_judge(completion, template, questions[completion.prompt]))
        if done * TOLD // total != (done - 1) * TOLD // total:
            emit(Progress(what=f"answering held-out questions ({role})", done=done, total=total))
    return answers


def measure(answers: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """pass@1 as the share of exact answers, pass@k for k samples a prompt, the share that stopped properly, and the
    mean length."""
    flat = [one for several in answers for one in several]
    samples = len(answers[0])
    found = {
        "exact": sum(one.exact for one in flat) / len(flat),
        "stopped": sum(one.stopped for one in flat) / len(flat),
        "length": sum(one.length for one in flat) / len(flat),
    }
    if samples > 1:
        found[f"pass_at_{samples}"] = sum(any(one.exact for one in several) for several in answers) / len(answers)
    return found


def is_exact(text: str, gold: str) -> bool:
    """Whether an answer is the gold one: equal as numbers, its last number counting; or equal as text."""
    wanted = _number(gold)
    if wanted is None:
        return " ".join(text.split()).casefold().rstrip(".") == " ".join(gold.split()).casefold().rstrip(".")
    found = NUMBER.findall(text)
    got = _number(found[-1]) if found else None
    return got is not None and math.isclose(got, wanted, rel_tol=0.0, abs_tol=1e-9)


def _number(text: str) -> float | None:
    plain = text.strip().replace(",", "").rstrip(".")
    return float(plain) if len(plain) < 40 and re.fullmatch(r"-?\d+(?:\.\d+)?", plain) else None


def _judge(completion: Completion, template: Template, question: Question) -> Answer:
    body = completion.ids[:-1] if completion.finish == "stop" else completion.ids
    text = template.decode(body)
    stopped = completion.finish == "stop" and not template.marks_in(body)
    # what runs on and on has not answered
    exact = stopped and question.gold is not None and is_exact(text, question.gold)
    return Answer(completion.prompt, text, stopped, exact, len(completion.ids))
