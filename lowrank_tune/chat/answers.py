"""Answers to questions that have nothing to do with each other: `chat --jsonl`, and `ask` in Python."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from lowrank_tune.chat.chat_model import AnswerStream, ChatModel, Variant
from lowrank_tune.chat.conversation import prompt_ids
from lowrank_tune.chat.loader import load_chat_model
from lowrank_tune.chat.questions import Question
from lowrank_tune.chat.sampling_options import SamplingOptions
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError
from lowrank_tune.events import ignore_event
from lowrank_tune.functional import step_seed


@dataclass(frozen=True)
class Answer:
    """An answer with its question. `finish_reason` is `stop`, `length`, or `turn` if the text began another turn."""

    question: Question
    variant: Variant
    text: str
    finish_reason: str
    tokens: int

    def to_json(self, encoding: str = "utf-8") -> str:
        """Returns the line of `chat --jsonl`, in ASCII if the encoding does not have all of its characters."""
        record = {
            "line": self.question.line,
            "question": self.question.text,
            "variant": self.variant,
            "answer": self.text,
            "finish_reason": self.finish_reason,
            "tokens": self.tokens,
        }
        if self.question.id is not None:
            record = {"id": self.question.id, **record}
        line = json.dumps(record, ensure_ascii=False)
        try:
            line.encode(encoding)
        except UnicodeEncodeError:
            # also for a lone surrogate, which an `id` may contain
            return json.dumps(record)
        return line


def ask(
    name: str,
    *questions: str,
    variant: str | None = None,
    options: SamplingOptions | None = None,
    system_prompt: str | None = None,
) -> list[Answer]:
    """Loads a run, a checkpoint, an adapter or a model, and returns its answers to the questions, each alone.

    `variant` is `base`, `tuned` or `both`; by default the tuned model answers, if there is one. Raises UserError.
    """
    options = options or SamplingOptions()
    chat_model = load_chat_model(
        name,
        ignore_event,
        max_new_tokens=options.max_new_tokens,
    )
    numbered = [Question([Message("user", text)], number) for number, text in enumerate(questions, 1)]
    return list(
        answer_all(
            chat_model,
            numbered,
            chosen_variants(chat_model, variant),
            options,
            system_prompt,
        )
    )


def chosen_variants(chat_model: ChatModel, name: str | None) -> Sequence[Variant]:
    """Returns the variants that answer. Raises UserError if there are no adapters for the tuned one."""
    if name is None:
        return chat_model.variants[-1:]
    if name != "base" and not chat_model.tuned:
        raise UserError(
            "there are no adapters here, so only the base can answer: open a run for the answers of a tuned model"
        )
    if name == "both":
        return ("base", "tuned")
    return (cast(Variant, name),)


def answer_all(
    chat_model: ChatModel,
    questions: Iterable[Question],
    variants: Sequence[Variant],
    options: SamplingOptions,
    system_prompt: str | None,
) -> Iterator[Answer]:
    """Yields the answers in the order of the questions. The system prompt, by default that of the run, is for questions
    without their own. Raises UserError with the line of a question that cannot be answered."""
    if system_prompt is None:
        system_prompt = chat_model.system_prompt
    for number, question in enumerate(questions):
        seed = step_seed(step_seed(options.seed, number), 0)
        ids = _prompt(chat_model, question, system_prompt)
        room = options.max_new_tokens
        if chat_model.positions is not None:
            room = min(room, chat_model.positions - len(ids))
        if room < 1:
            raise UserError(
                f"line {question.line}: the question takes {len(ids):,} tokens and the base reads at most "
                f"{chat_model.positions:,}: shorten it"
            )
        sampling = options.sampling(chat_model.stop_ids, room, seed)
        for variant in variants:
            stream = AnswerStream(
                chat_model,
                variant,
                ids,
                sampling,
            )
            yield _read_answer(chat_model, stream, question)


def _prompt(
    chat_model: ChatModel,
    question: Question,
    system_prompt: str | None,
) -> list[int]:
    messages = list(question.messages)
    if system_prompt and messages[0].role != "system":
        messages.insert(0, Message("system", system_prompt))
    try:
        return prompt_ids(chat_model.template, messages)
    except UserError as error:
        raise UserError(f"line {question.line}: {error}") from error


def _read_answer(
    chat_model: ChatModel,
    stream: AnswerStream,
    question: Question,
) -> Answer:
    """Reads the stream to its end."""
    for _ in stream:
        continue
    return Answer(
        question,
        stream.variant,
        chat_model.template.answer_content(stream.text),
        stream.finish_reason,
        stream.tokens,
    )
