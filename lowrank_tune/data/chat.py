"""Chat text: from turns to ids, and for each id whether the assistant says it. One door for all bases."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from lowrank_tune.data.backend import Backend
from lowrank_tune.data.formats import RowFault
from lowrank_tune.data.piecewise import KitMarks, PlainWords
from lowrank_tune.data.rendered import OwnTemplate
from lowrank_tune.errors import UserError
from lowrank_tune.types import Message, Row


class Template:
    """How a base writes a conversation. `encode` of a prompt's turns and an answer begins with exactly the ids of
    `prompt`."""

    def __init__(self, backend: Backend, scheme: KitMarks | PlainWords | OwnTemplate) -> None:
        self._backend, self._scheme = backend, scheme
        self.tokenizer: Any = backend.tokenizer
        self.end_ids: frozenset[int] = scheme.end_ids
        """A completion ends at any of these (and at those that the base's generation config adds)."""
        self.pad_id: int = backend.pad
        """Any valid id: padding is masked, never recognised by its id."""
        own = getattr(backend.tokenizer, "chat_template", None) or ""
        named = f"{type(scheme).__name__} {scheme.about} {backend.bos} {backend.eos} {own}"
        self.fingerprint: str = hashlib.blake2b(
            f"{named}\n{backend.state}".encode("utf-8", "replace"), digest_size=16
        ).hexdigest()
        """Changes with anything that changes the ids."""

    @classmethod
    def of(cls, tokenizer: Any) -> Template:
        """The tokenizer's own template; or the kit's, where the vocabulary has its control tokens; or plain words."""
        backend = Backend(tokenizer)
        if tokenizer.chat_template:
            return cls(backend, OwnTemplate(backend))
        return cls(backend, KitMarks(backend) if KitMarks.fits(backend) else PlainWords(backend))

    def encode(self, messages: Sequence[Message]) -> Row:
        """A conversation that ends with the assistant. Raises `RowFault`."""
        row = self.encode_many([messages])[0]
        if isinstance(row, RowFault):
            raise row
        return row

    def encode_many(self, conversations: Sequence[Sequence[Message]]) -> list[Row | RowFault]:
        """The same for many, through one call of the tokenizer."""
        return self._scheme.encode_many(conversations)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to the place where the assistant starts. Raises `UserError` where `spoils` has a reason: here a person
        may have typed it."""
        try:
            return self._scheme.prompt(messages)
        except RowFault as fault:
            raise UserError(f"this cannot be asked of the base: {fault.reason}") from fault

    def spoils(self, messages: Sequence[Message]) -> str | None:
        """Why these turns cannot be used with this template; None where they can."""
        return self._scheme.spoils(messages)

    def decode(self, ids: Sequence[int], marks: bool = False) -> str:
        """Text of ids, with the control tokens only where `marks`."""
        return self._backend.decode(ids, marks)

    def marks_in(self, ids: Sequence[int]) -> bool:
        """Whether any of these ids is a control token."""
        return not self._backend.control.isdisjoint(ids)

    @property
    def turn_marks(self) -> re.Pattern[str] | None:
        """What an answer must not hold, for it begins another turn: of bases whose markers are plain words. Else
        control tokens do that."""
        return self._scheme.marker_pattern if isinstance(self._scheme, PlainWords) else None

    @property
    def jinja(self) -> str:
        """The same as a chat template for other software, which renders a text and then encodes it whole."""
        return self._scheme.jinja

    def describe(self) -> str:
        """One sentence for the start-up line."""
        ends = ", ".join(f"`{self._backend.name(number)}`" for number in sorted(self.end_ids))
        return f"chat text by {self._scheme.about}; an answer ends at {ends}"
