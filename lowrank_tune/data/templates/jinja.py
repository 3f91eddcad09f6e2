"""Chat text by the template of the tokenizer, and where the assistant's answers are in it.

Nothing is assumed of the template. The ids of a prompt are those of `apply_chat_template` with
`add_generation_prompt=True`, with or without a BOS, and an answer is trained only after them (`generation_prompt.py`
defines what follows). One rule applies to all answers of a conversation: the ids up to the last answer are those of its
prompt, encoded whole as at inference. If they do not begin with the ids of an earlier answer's prompt, because the
tokenizer encodes the end of that prompt in another way once the answer follows, the earlier answer is context and not
trained. The last answer is encoded apart from its prompt if a token would reach across. A control token in the text of
a row is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date

from lowrank_tune.batch import Row
from lowrank_tune.data.formats import (
    ChatMessages,
    InvalidRow,
    RowOrFault,
    text_fault,
)
from lowrank_tune.data.message import Message
from lowrank_tune.data.templates.backend import TokenizerBackend
from lowrank_tune.data.templates.date import with_date
from lowrank_tune.data.templates.encoder import SpanEncoder
from lowrank_tune.data.templates.generation_prompt import GenerationPrompt
from lowrank_tune.data.templates.placeholders import Placeholders
from lowrank_tune.data.templates.render_process import RenderProcess
from lowrank_tune.data.templates.renderer import (
    PROBE_ANSWER,
    PROBE_CONVERSATION,
    PROBE_QUESTION,
    Rendering,
    TemplateRenderer,
)
from lowrank_tune.data.templates.spans import Rendered, SpanFinder
from lowrank_tune.errors import UserError

SYSTEM_NOTES = {
    "own": "",
    "always": " (with an empty system turn where there is none)",
    "folded": " (a system text goes before the question)",
}
UNUSABLE = "the base's chat template cannot be trained with"


class JinjaChatTemplate:
    """The chat template that came with the tokenizer. `day` is the date that it writes, if it writes one."""

    def __init__(
        self,
        backend: TokenizerBackend,
        day: date | None = None,
        process: RenderProcess | None = None,
    ) -> None:
        self.backend = backend
        self.dated_chat_template = with_date(self.chat_template, day)
        self._placeholders = Placeholders(backend)
        self._renderer = TemplateRenderer(
            backend.tokenizer,
            self.dated_chat_template,
            process,
        )
        question, answered = self._probe()
        self.generation_prompt = _probe_generation_prompt(question, answered)
        after_answer = answered.rpartition(PROBE_ANSWER)[2]
        end_tokens = backend.special_pattern.findall(after_answer)
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
        self.description = self._describe()

    @property
    def chat_template(self) -> str:
        """The unchanged template."""
        return str(self.backend.tokenizer.get_chat_template())

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

    def _describe(self) -> str:
        description = f"the tokenizer's own template{SYSTEM_NOTES[self._renderer.system_mode]}"
        opened = self.generation_prompt.opened
        if opened is not None:
            description += (
                f"; its generation prompt opens a thought (`{opened.tag}`), which an answer without one closes at once"
            )
        with_thought = Message("assistant", f"<think>\nHm.\n</think>\n\n{PROBE_ANSWER}")
        conversations = [PROBE_CONVERSATION * 2, (PROBE_CONVERSATION[0], with_thought) * 2]
        rendered = [item for item in self._spans.render(conversations) if isinstance(item, Rendered)]
        if any(len(item.spans) < 2 for item in rendered):
            return f"{description}; it rewrites earlier turns, and where it does only the last answer is trained"
        rows = self._encoder.encode_many(rendered)
        if any(isinstance(row, Row) and _count_stretches(row) < 2 for row in rows):
            description += (
                "; the tokenizer may encode the end of a prompt in another way once an answer follows, and an earlier "
                "answer for which it does is not trained"
            )
        return description

    def validate_messages(self, messages: ChatMessages) -> str | None:
        """Returns why these messages cannot be rendered; None if they can."""
        reason = text_fault(messages)
        if reason is not None:
            return reason
        rendered = self._renderer.render(messages, add_generation_prompt=messages[-1].role != "assistant")
        if isinstance(rendered, InvalidRow):
            return rendered.reason
        return None

    def prompt_many(self, conversations: Sequence[ChatMessages]) -> list[list[int] | InvalidRow]:
        """Returns the ids up to each answer of the assistant, those of `apply_chat_template`, or the fault."""
        reasons = [text_fault(messages) for messages in conversations]
        renderings = [
            Rendering(self._placeholders.insert(messages), True, row)
            for row, (messages, reason) in enumerate(zip(conversations, reasons, strict=True))
            if reason is None
        ]
        texts = iter(self._renderer.render_all(renderings))
        prompts: list[list[int] | InvalidRow] = []
        for reason in reasons:
            text = next(texts) if reason is None else InvalidRow(reason)
            prompts.append(text if isinstance(text, InvalidRow) else self._encoder.encode_prompt(text))
        return prompts

    def encode_many(self, conversations: Sequence[ChatMessages]) -> list[RowOrFault]:
        """Returns rows with their masks."""
        inserted = [self._placeholders.insert(messages) for messages in conversations]
        return self._encoder.encode_many(self._spans.render(inserted))


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


def _count_stretches(row: Row) -> int:
    """Returns how many answers are trained."""
    mask = row.completion_mask
    return sum(trained and not before for before, trained in zip([False, *mask], mask, strict=False))
