"""`lowrank-tune chat RUN|MODEL`: a conversation with the base, the tuned model, or both, over one base in memory."""

from __future__ import annotations

import sys
from contextlib import closing

from lowrank_tune.chat.answers import Answer, answer_all, ask, chosen_variants
from lowrank_tune.chat.chat_model import AnswerStream, ChatModel, Variant
from lowrank_tune.chat.commands import HELP
from lowrank_tune.chat.conversation import Conversation, append_row
from lowrank_tune.chat.loader import load_chat_model
from lowrank_tune.chat.questions import read_questions
from lowrank_tune.chat.sampling_options import SamplingOptions
from lowrank_tune.chat.session import ChatSession
from lowrank_tune.data.templates.template_kwargs import NO_KWARGS, TemplateKwargs
from lowrank_tune.ui.terminal.chat_screen import ChatScreen
from lowrank_tune.ui.terminal.plain import LineLogger
from lowrank_tune.ui.terminal.prompt import PipedInput

__all__ = [
    "Answer",
    "AnswerStream",
    "ChatSession",
    "ChatModel",
    "Conversation",
    "Variant",
    "SamplingOptions",
    "append_row",
    "ask",
    "chat",
    "chat_jsonl",
    "load_chat_model",
]


def chat(
    name: str,
    options: SamplingOptions,
    variant: str | None = None,
    system_prompt: str | None = None,
    bits: int | None = None,
    base: str | None = None,
    template_kwargs: TemplateKwargs = NO_KWARGS,
) -> None:
    """Loads a run or model and runs a chat session until the end of the input.

    `system_prompt` None is the run's own system prompt, an empty text is none. Raises UserError, and KeyboardInterrupt
    if a session without a terminal is interrupted.
    """
    chat_model = _load(name, options, bits, base, template_kwargs)
    screen = ChatScreen(list(HELP))
    session = ChatSession(
        chat_model,
        screen,
        options,
        variant or chat_model.variants[-1],
        chat_model.system_prompt if system_prompt is None else system_prompt,
    )
    if screen.live:
        screen.note(_greeting(session))
    session.run()


def chat_jsonl(
    name: str,
    options: SamplingOptions,
    variant: str | None = None,
    system_prompt: str | None = None,
    bits: int | None = None,
    base: str | None = None,
    template_kwargs: TemplateKwargs = NO_KWARGS,
) -> None:
    """Loads a run or model and answers each line of the standard input by itself: one JSON object a line.

    Raises UserError with the line of a faulty question, after the answers to those before it.
    """
    chat_model = _load(name, options, bits, base, template_kwargs)
    answers = answer_all(
        chat_model,
        read_questions(PipedInput()),
        chosen_variants(chat_model, variant),
        options,
        system_prompt,
    )
    for answer in answers:
        print(answer.to_json(sys.stdout.encoding or "utf-8"), flush=True)


def _load(
    name: str,
    options: SamplingOptions,
    bits: int | None,
    base: str | None,
    template_kwargs: TemplateKwargs,
) -> ChatModel:
    with closing(LineLogger(sys.stderr)) as logger:
        return load_chat_model(
            name,
            logger,
            bits,
            base,
            max_new_tokens=options.max_new_tokens,
            template_kwargs=template_kwargs,
        )


def _greeting(session: ChatSession) -> str:
    variants = " and ".join(session.variants)
    if session.options.temperature == 0:
        sampling = "greedy, as in evaluation"
    else:
        sampling = f"temperature {session.options.temperature:g}"
    system = ""
    if session.conversation.system_prompt:
        system = ", with a system prompt (/system shows it)"
    choice = ""
    if session.chat_model.tuned:
        choice = "/base, /tuned and /both choose who answers, "
    return f"{variants} will answer, {sampling}{system}\n{choice}/help lists all commands, Ctrl-D ends"
