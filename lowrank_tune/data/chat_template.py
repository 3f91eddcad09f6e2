"""Chat text: from turns to ids, and for each id whether the assistant says it. One door for all bases."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from lowrank_tune.data.fallback_templates import DefaultTemplate, PlainTextTemplate
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.data.jinja_template import JinjaChatTemplate
from lowrank_tune.data.tokenizer_backend import TokenizerBackend
from lowrank_tune.errors import UserError
from lowrank_tune.types import Message, Row

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class ChatTemplate:
    """How a base writes a conversation. `encode` of a prompt's turns and an answer begins with exactly the ids of
    `prompt`."""

    def __init__(
        self, backend: TokenizerBackend, scheme: DefaultTemplate | PlainTextTemplate | JinjaChatTemplate
    ) -> None:
        self._backend, self._scheme = backend, scheme
        self.tokenizer: Any = backend.tokenizer
        self.end_ids: frozenset[int] = scheme.end_ids
        """A completion ends at any of these (and at those that the base's generation config adds)."""
        self.pad_id: int = backend.pad
        """Any valid id: padding is masked, never recognized by its id."""
        own = getattr(backend.tokenizer, "chat_template", None) or ""
        named = f"{type(scheme).__name__} {scheme.description} {backend.bos} {backend.eos} {own}"
        self.fingerprint: str = hashlib.blake2b(
            f"{named}\n{backend.state}".encode("utf-8", "replace"), digest_size=16
        ).hexdigest()
        """Changes with anything that changes the ids."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> ChatTemplate:
        """The tokenizer's own template; or the kit's, where the vocabulary has its control tokens; or plain words."""
        backend = TokenizerBackend(tokenizer)
        if tokenizer.chat_template:
            return cls(backend, JinjaChatTemplate(backend))
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
        return self._scheme.marker_pattern if isinstance(self._scheme, PlainTextTemplate) else None

    @property
    def chat_template(self) -> str:
        """The same as a chat template for other software, which renders a text and then encodes it whole."""
        return self._scheme.chat_template

    def describe(self) -> str:
        """One sentence for the start-up line."""
        ends = ", ".join(f"`{self._backend.id_to_token(number)}`" for number in sorted(self.end_ids))
        return f"chat text by {self._scheme.description}; an answer ends at {ends}"
