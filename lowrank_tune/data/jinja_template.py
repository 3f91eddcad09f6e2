"""Chat text by the tokenizer's own template, and where in it the assistant speaks.

Nothing is assumed of the template. The ids of a prompt are those that `apply_chat_template` gives with
`add_generation_prompt=True`, its BOS or none, and an answer is trained only behind them (`generation_prompt.py` defines
what follows). One rule for all answers of a conversation: the ids up to the last answer are those of its prompt,
encoded whole as at inference. Where the ids of an earlier answer's prompt are not their beginning, because the
tokenizer encodes the end of that prompt in another way once the answer follows, the earlier answer is context and not
trained. The last answer is cut off from its prompt where a token would reach across. A control token in a row's own
text is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date

from lowrank_tune.batch import Row
from lowrank_tune.data.answer_spans import Rendered, SpanFinder
from lowrank_tune.data.fallback_templates import NOT_TEXT, ChatMessages
from lowrank_tune.data.formats import InvalidRow, is_text
from lowrank_tune.data.generation_prompt import GenerationPrompt
from lowrank_tune.data.message import Message
from lowrank_tune.data.placeholders import Placeholders
from lowrank_tune.data.span_encoder import SpanEncoder
from lowrank_tune.data.template_date import with_date
from lowrank_tune.data.template_renderer import PROBE_ANSWER, PROBE_QUESTION, TemplateRenderer
from lowrank_tune.data.tokenizer_backend import TokenizerBackend
from lowrank_tune.errors import UserError

SYSTEM_NOTES = {
    "own": "",
    "always": " (with an empty system turn where there is none)",
    "folded": " (a system text goes before the question)",
}


class JinjaChatTemplate:
    """The chat template that came with the tokenizer. `day` is the date that it writes, where it writes one."""

    def __init__(self, backend: TokenizerBackend, day: date | None = None) -> None:
        self.backend = backend
        self.dated_chat_template = with_date(self.chat_template, day)
        self._placeholders = Placeholders(backend)
        self._renderer = TemplateRenderer(backend.tokenizer, self.dated_chat_template)
        question, answered = self._probe()
        self.generation_prompt = self._probe_generation_prompt(question, answered)
        closing_tokens = backend.special_pattern.findall(answered.rpartition(PROBE_ANSWER)[2])
        special = f"(?:{backend.special_pattern.pattern})"
        closers = "|".join(map(re.escape, closing_tokens)) or "(?!)"
        self._spans = SpanFinder(
            self._renderer,
            self.generation_prompt,
            re.compile(rf"(?P<close>(?:{closers})+)(?:\s|{special})*\Z"),
        )
        template_tokens = dict.fromkeys(backend.special_pattern.findall(question + answered))
        self._encoder = SpanEncoder(backend, self._placeholders, list(template_tokens))
        end_ids = {backend.special_tokens[token] for token in closing_tokens}
        if backend.eos is None and not end_ids:
            raise UserError("the base's chat template closes answers with no end token, and its tokenizer names none")
        self.end_ids = frozenset(end_ids | ({backend.eos} if backend.eos is not None else set()))
        self.description = self._describe()

    @property
    def chat_template(self) -> str:
        """The template as it came."""
        return str(self.backend.tokenizer.get_chat_template())

    def _probe(self) -> tuple[str, str]:
        """A question as a prompt, and the same with its answer."""
        messages = [Message("user", PROBE_QUESTION), Message("assistant", PROBE_ANSWER)]
        question, answered = self._renderer.render_all([(messages[:1], True), (messages, False)])
        for text in (question, answered):
            if isinstance(text, InvalidRow):
                raise UserError(f"the base's chat template cannot be trained with: {text.reason}")
        assert isinstance(question, str) and isinstance(answered, str)
        if PROBE_QUESTION not in question or PROBE_ANSWER not in answered:
            raise UserError(
                "the base's chat template cannot be trained with: it leaves out the text of a turn (templates for "
                "images take lists of parts, not text)"
            )
        return question, answered

    def _probe_generation_prompt(self, question: str, answered: str) -> GenerationPrompt:
        found = GenerationPrompt.from_probe(question, answered, PROBE_QUESTION, PROBE_ANSWER)
        if found is None:
            raise UserError(
                f"the base's chat template cannot be trained with: its generation prompt ends with {question[-40:]!r}, "
                f"and it writes an answer as {answered[-60:]!r}, which does not continue it; give the base a "
                "`chat_template` whose generation prompt is the beginning of an answer"
            )
        return found

    def _describe(self) -> str:
        description = f"the tokenizer's own template{SYSTEM_NOTES[self._renderer.system_mode]}"
        opened = self.generation_prompt.opened
        if opened is not None:
            description += (
                f"; its generation prompt opens a thought (`{opened.tag}`), which an answer without one closes at once"
            )
        conversations = [
            [Message("user", PROBE_QUESTION), Message("assistant", answer)] * 2
            for answer in (PROBE_ANSWER, f"<think>\nHm.\n</think>\n\n{PROBE_ANSWER}")
        ]
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
        """Why these turns cannot be rendered; None where they can."""
        if not all(is_text(message.content) for message in messages):
            return NOT_TEXT
        rendered = self._renderer.render_or_fault(messages, add_generation_prompt=messages[-1].role != "assistant")
        if isinstance(rendered, InvalidRow):
            return rendered.reason
        return None

    def prompt(self, messages: ChatMessages) -> list[int]:
        """Ids up to the place where the assistant starts: those of `apply_chat_template`."""
        if not all(is_text(message.content) for message in messages):
            raise InvalidRow(NOT_TEXT)
        text = self._renderer.render(self._placeholders.insert(messages), add_generation_prompt=True)
        return self._encoder.encode_prompt(text)

    def encode_many(self, rows: Sequence[ChatMessages]) -> list[Row | InvalidRow]:
        """Rows with their masks."""
        return self._encoder.encode_many(self._spans.render([self._placeholders.insert(row) for row in rows]))


def _count_stretches(row: Row) -> int:
    """How many answers are trained."""
    mask = row.completion_mask
    return sum(trained and not before for before, trained in zip([False, *mask], mask, strict=False))
