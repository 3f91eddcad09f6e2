"""Chat text: from turns to ids, and for each id whether the assistant says it. One door for all bases."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import date
from typing import Any

from lowrank_tune.batch import Row
from lowrank_tune.data.fallback_templates import DefaultTemplate, PlainTextTemplate
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.data.jinja_template import JinjaChatTemplate
from lowrank_tune.data.message import Message
from lowrank_tune.data.template_date import fixed_date
from lowrank_tune.data.tokenizer_backend import TokenizerBackend, default_chat_template
from lowrank_tune.errors import UserError

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class ChatTemplate:
    """How a base writes a conversation. `encode` of a prompt's turns and an answer begins with exactly the ids of
    `prompt`."""

    def __init__(
        self,
        backend: TokenizerBackend,
        scheme: DefaultTemplate | PlainTextTemplate | JinjaChatTemplate,
        date_written: date | None = None,
    ) -> None:
        self._backend = backend
        self._scheme = scheme
        self.date_written: date | None = date_written
        """The date in every text, where the template writes one; fixed when this was made."""
        self.tokenizer: Any = backend.tokenizer
        self.end_ids: frozenset[int] = scheme.end_ids
        """A completion ends at any of these (and at those that the base's generation config adds)."""
        self.pad_id: int = backend.pad
        """Any valid id: padding is masked, never recognized by its id."""
        own = getattr(backend.tokenizer, "chat_template", None) or ""
        named = f"{type(scheme).__name__} {scheme.description} {backend.bos} {backend.eos} {own}"
        named += f" {date_written}" if date_written else ""
        self.fingerprint: str = hashlib.blake2b(
            f"{named}\n{backend.state}".encode("utf-8", "replace"), digest_size=16
        ).hexdigest()
        """Changes with anything that changes the ids."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, template_date: str | None = None) -> ChatTemplate:
        """The tokenizer's own template; or the kit's, where the vocabulary has its control tokens; or plain words.

        `template_date` (YYYY-MM-DD) is the date that a template with one writes: a run passes its own, so that all its
        prompts are the same on every day. By default today, where the template uses the clock. Raises UserError where
        the template writes none.
        """
        backend = TokenizerBackend(tokenizer)
        own = default_chat_template(tokenizer)
        date_written = fixed_date(own, template_date)
        if own is not None:
            return cls(backend, JinjaChatTemplate(backend, date_written), date_written)
        return cls(
            backend,
            DefaultTemplate(backend) if DefaultTemplate.has_all_special_tokens(backend) else PlainTextTemplate(backend),
        )

    def encode(self, messages: Sequence[Message]) -> Row:
        """A conversation that ends with the assistant. Raises `InvalidRow`."""
        row = self.encode_many([messages])[0]
        if isinstance(row, InvalidRow):
            raise row
        return row

    def encode_many(self, conversations: Sequence[Sequence[Message]]) -> list[Row | InvalidRow]:
        """The same for many, through one call of the tokenizer."""
        return self._scheme.encode_many(conversations)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to the place where the assistant starts. Raises `UserError` where `validate_messages` has a reason:
        here a person may have typed it."""
        try:
            return self._scheme.prompt(messages)
        except InvalidRow as fault:
            raise UserError(f"this cannot be asked of the base: {fault.reason}") from fault

    def validate_messages(self, messages: Sequence[Message]) -> str | None:
        """Why these turns cannot be used with this template; None where they can."""
        return self._scheme.validate_messages(messages)

    def decode(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        """Text of ids, with the control tokens only where `special_tokens`."""
        return self._backend.decode(ids, special_tokens)

    def special_tokens_in(self, ids: Sequence[int]) -> bool:
        """Whether any of these ids is a control token."""
        return not self._backend.control_ids.isdisjoint(ids)

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is a single byte (`<0x0A>`), as tokenizers with byte fallback have them."""
        return BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "") is not None

    @property
    def turn_delimiters(self) -> re.Pattern[str] | None:
        """What an answer must not hold, for it begins another turn: of bases whose markers are plain words. Else
        control tokens do that."""
        if isinstance(self._scheme, PlainTextTemplate):
            return self._scheme.marker_pattern
        return None

    @property
    def dated_chat_template(self) -> str:
        """`chat_template` with its date fixed, where it writes one: it renders the text that is trained, on any day."""
        if isinstance(self._scheme, JinjaChatTemplate):
            return self._scheme.dated_chat_template
        return self.chat_template

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """What `dated_chat_template` makes of turns in other software."""
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.dated_chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )

    @property
    def begins_with_bos(self) -> bool:
        """Whether the tokenizer's BOS is the first token of a prompt."""
        return self._backend.bos is not None and self.prompt([Message("user", "?")])[:1] == [self._backend.bos]

    def answer_content(self, text: str) -> str:
        """A completion's text as the content of a turn: where the prompt opened a thought and the text closes it, with
        the opening tag."""
        if not isinstance(self._scheme, JinjaChatTemplate):
            return text
        return self._scheme.generation_prompt.with_tag(text)

    @property
    def chat_template(self) -> str:
        """The same as a chat template for other software, which renders a text and then encodes it whole."""
        return self._scheme.chat_template

    def describe(self) -> str:
        """One sentence for the start-up line."""
        ends = ", ".join(f"`{self._backend.id_to_token(number)}`" for number in sorted(self.end_ids))
        if self.date_written:
            dated = f"; it writes the date {self.date_written}"
        else:
            dated = ""
        return f"chat text by {self._scheme.description}{dated}; an answer ends at {ends}"
