"""Chat text by the template of the tokenizer, and where the assistant's answers are in it.

Nothing is assumed of the template. The ids of a prompt are those of `apply_chat_template` with
`add_generation_prompt=True`, with or without a BOS, and an answer is trained only after them (`generation_prompt.py`
defines what follows). Every answer of a conversation is trained once, after the ids of its own prompt, encoded whole as
at inference. Answers whose prompts are the beginning of a later one share a row with it. Where the template rewrites an
earlier turn, or the tokenizer encodes the end of a prompt in another way once the answer follows, the earlier answer
has a row of its own. An answer is encoded apart from its prompt if a token would reach across. A control token in the
text of a row is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import NamedTuple

from lowrank_tune.batch import Row
from lowrank_tune.data.formats import (
    ChatMessages,
    InvalidRow,
    text_fault,
)
from lowrank_tune.data.message import Message
from lowrank_tune.data.templates.backend import TokenizerBackend
from lowrank_tune.data.templates.date import with_date
from lowrank_tune.data.templates.encoder import SpanEncoder
from lowrank_tune.data.templates.generation_prompt import GenerationPrompt, closes_thought
from lowrank_tune.data.templates.message_fields import PROBE_CALL, PROBE_TOOLS
from lowrank_tune.data.templates.placeholders import Placeholders
from lowrank_tune.data.templates.render_process import RenderProcess
from lowrank_tune.data.templates.renderer import (
    PROBE_ANSWER,
    PROBE_CONVERSATION,
    PROBE_QUESTION,
    Rendering,
    TemplateRenderer,
)
from lowrank_tune.data.templates.spans import SpanFinder
from lowrank_tune.data.templates.template_kwargs import NO_KWARGS, TemplateKwargs, with_kwargs
from lowrank_tune.errors import UserError

SYSTEM_NOTES = {
    "own": "",
    "always": " (with an empty system turn where there is none)",
    "folded": " (a system text goes before the question)",
}
THINKING_SWITCH = "enable_thinking"
"""The variable of a template that switches thinking on and off."""
UNUSABLE = "the base's chat template cannot be trained with"


class JinjaChatTemplate:
    """The chat template that came with the tokenizer. `day` is the date that it writes, if it writes one; `kwargs` are
    the values of its variables."""

    def __init__(
        self,
        backend: TokenizerBackend,
        day: date | None = None,
        process: RenderProcess | None = None,
        kwargs: TemplateKwargs = NO_KWARGS,
    ) -> None:
        self.backend = backend
        own = str(backend.tokenizer.get_chat_template())
        self.chat_template = with_kwargs(own, kwargs)
        """The template with the recipe's values of its variables as defaults."""
        self.fixed_chat_template = with_kwargs(with_date(own, day), kwargs)
        self._placeholders = Placeholders(backend)
        self._renderer = TemplateRenderer(
            backend.tokenizer,
            self.fixed_chat_template,
            process,
        )
        question, answered = self._probe()
        self.generation_prompt = replace(
            _probe_generation_prompt(question, answered),
            header=self._probe_header(question),
        )
        end_tokens = self._end_tokens(answered)
        self._spans = SpanFinder(
            self._renderer,
            self.generation_prompt,
            _closing_pattern(backend, end_tokens),
        )
        template_tokens = dict.fromkeys(backend.special_pattern.findall(question + answered))
        self._encoder = SpanEncoder(
            backend,
            self._placeholders,
            list(template_tokens),
        )
        end_ids = {backend.special_tokens[token] for token in end_tokens}
        if backend.eos is not None:
            end_ids.add(backend.eos)
        if not end_ids:
            raise UserError("the base's chat template closes answers with no end token, and its tokenizer names none")
        self.end_ids = frozenset(end_ids)
        self.lets_model_think = THINKING_SWITCH in own and not closes_thought(question)
        """Whether the template has a switch for thinking, and it is on."""
        self.description = self._describe()

    def _probe(self) -> tuple[str, str]:
        """Returns a question as a prompt, and the same with its answer."""
        question = self._renderer.probe(PROBE_CONVERSATION[:1], add_generation_prompt=True)
        answered = self._renderer.probe(PROBE_CONVERSATION)
        for text in (question, answered):
            if isinstance(text, InvalidRow):
                raise UserError(f"{UNUSABLE}: {text.reason}")
        assert isinstance(question, str) and isinstance(answered, str)
        if PROBE_QUESTION not in question or PROBE_ANSWER not in answered:
            raise UserError(
                f"{UNUSABLE}: it leaves out the text of a turn (templates for images take lists of parts, not text)"
            )
        return question, answered

    def _probe_header(self, question: str) -> str:
        """Returns what the generation prompt adds to a question."""
        alone = self._renderer.probe(PROBE_CONVERSATION[:1])
        if isinstance(alone, InvalidRow) or not question.startswith(alone):
            return ""
        return question.removeprefix(alone)

    def _end_tokens(self, answered: str) -> list[str]:
        """Returns the control tokens after an answer, and the last one after a tool call."""
        pattern = self.backend.special_pattern
        after_answer = answered.rpartition(PROBE_ANSWER)[2]
        end_tokens: list[str] = pattern.findall(after_answer)
        fields = self._renderer.fields
        if fields.writes_calls:
            call = Message("assistant", "", tool_calls=(PROBE_CALL,))
            tools = PROBE_TOOLS if fields.writes_tools else ""
            called = self._renderer.probe((PROBE_CONVERSATION[0], call), tools=tools)
            if isinstance(called, str):
                after_call = re.search(rf"(?P<last>{pattern.pattern})\s*\Z", called)
                end_tokens += [] if after_call is None else [after_call["last"]]
        return list(dict.fromkeys(end_tokens))

    def _describe(self) -> str:
        description = f"the tokenizer's own template{SYSTEM_NOTES[self._renderer.system_mode]}"
        opened = self.generation_prompt.opened
        if opened is not None:
            description += (
                f"; its generation prompt opens a thought (`{opened.tag}`), which an answer without one closes at once"
            )
        with_thought = Message("assistant", PROBE_ANSWER, reasoning_content="Hm.")
        conversations = [PROBE_CONVERSATION * 2, (PROBE_CONVERSATION[0], with_thought) * 2]
        if any(not isinstance(rows, InvalidRow) and len(rows) > 1 for rows in self.encode_all(conversations)):
            description += (
                "; it rewrites earlier turns, and each answer that it rewrites is trained in a row of its own"
            )
        return description

    def validate_messages(self, messages: ChatMessages, tools: str = "") -> str | None:
        """Returns why these messages cannot be rendered; None if they can."""
        reason = self._fault(messages, tools)
        if reason is not None:
            return reason
        is_answered = messages[-1].role == "assistant"
        rendered = self._renderer.render(self._normalize(messages), not is_answered, tools)
        if isinstance(rendered, InvalidRow):
            return rendered.reason
        return None

    def prompt_many(
        self,
        conversations: Sequence[ChatMessages],
        tools: Sequence[str] = (),
    ) -> list[list[int] | InvalidRow]:
        """Returns the ids up to each answer of the assistant, those of `apply_chat_template`, or the fault."""
        prepared = self._prepare(conversations, tools)
        renderings = []
        for row, item in enumerate(prepared):
            if not isinstance(item, InvalidRow):
                renderings.append(Rendering(item.messages, True, row, item.tools))
        texts = iter(self._renderer.render_all(renderings))
        prompts: list[list[int] | InvalidRow] = []
        for item in prepared:
            text = item if isinstance(item, InvalidRow) else next(texts)
            prompts.append(text if isinstance(text, InvalidRow) else self._encoder.encode_prompt(text))
        return prompts

    def encode_all(
        self,
        conversations: Sequence[ChatMessages],
        tools: Sequence[str] = (),
        last_only: bool = False,
    ) -> list[tuple[Row, ...] | InvalidRow]:
        """Returns the rows of each conversation with their masks, that of its last answer first; with `last_only` this
        one alone counts, and has all answers that its text contains."""
        prepared = self._prepare(conversations, tools)
        usable = [item for item in prepared if not isinstance(item, InvalidRow)]
        rendered = self._spans.render(
            [item.messages for item in usable],
            [item.tools for item in usable],
            last_only,
        )
        encoded = iter(self._encoder.encode_many(rendered))
        return [item if isinstance(item, InvalidRow) else next(encoded) for item in prepared]

    def _prepare(
        self,
        conversations: Sequence[ChatMessages],
        tools: Sequence[str],
    ) -> list[_Prepared | InvalidRow]:
        """Returns conversations in the form that the template reads, with placeholders for control tokens; or why it
        cannot."""
        prepared: list[_Prepared | InvalidRow] = []
        for messages, definitions in zip(conversations, tools or [""] * len(conversations), strict=True):
            reason = self._fault(messages, definitions)
            if reason is None:
                inserted = self._placeholders.insert(messages)
                prepared.append(
                    _Prepared(
                        self._normalize(inserted),
                        self._placeholders.insert_json(definitions),
                    )
                )
            else:
                prepared.append(InvalidRow(reason))
        return prepared

    def _fault(self, messages: ChatMessages, tools: str) -> str | None:
        return text_fault(messages) or self._renderer.fields.fault(messages, tools)

    def _normalize(self, messages: ChatMessages) -> list[Message]:
        return [self._renderer.fields.normalize(message) for message in messages]


class _Prepared(NamedTuple):
    """A conversation as the template reads it."""

    messages: ChatMessages
    tools: str


def _probe_generation_prompt(question: str, answered: str) -> GenerationPrompt:
    found = GenerationPrompt.from_probe(
        question,
        answered,
        PROBE_QUESTION,
        PROBE_ANSWER,
    )
    if found is None:
        raise UserError(
            f"{UNUSABLE}: its generation prompt ends with {question[-40:]!r}, "
            f"and it writes an answer as {answered[-60:]!r}, which does not continue it; give the base a "
            "`chat_template` whose generation prompt is the beginning of an answer"
        )
    return found


def _closing_pattern(backend: TokenizerBackend, end_tokens: Sequence[str]) -> re.Pattern[str]:
    """Returns the pattern of the end tokens (`close`) at the end of a text, with what follows them."""
    closers = "|".join(map(re.escape, end_tokens)) or "(?!)"
    special = f"(?:{backend.special_pattern.pattern})"
    return re.compile(rf"(?P<close>(?:{closers})+)(?:\s|{special})*\Z")
