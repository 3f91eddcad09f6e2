"""Chat text: from the messages of a conversation to ids, and for each id whether it is part of an answer. The one
interface for all bases."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any

from lowrank_tune.batch import Row
from lowrank_tune.config import DataConfig
from lowrank_tune.data.formats import InvalidRow, RowOrFault
from lowrank_tune.data.message import Message
from lowrank_tune.data.templates.backend import (
    TokenizerBackend,
    default_chat_template,
)
from lowrank_tune.data.templates.date import fixed_date
from lowrank_tune.data.templates.fallback import (
    DefaultTemplate,
    PlainTextTemplate,
)
from lowrank_tune.data.templates.jinja import JinjaChatTemplate
from lowrank_tune.data.templates.render_process import RenderProcess, RenderRequest, Template, shared_process
from lowrank_tune.data.templates.template_kwargs import NO_KWARGS, TemplateKwargs, check_kwargs
from lowrank_tune.errors import UserError

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
Scheme = DefaultTemplate | PlainTextTemplate | JinjaChatTemplate


class ChatTemplate:
    """How a base renders a conversation. `encode` of a prompt's messages and an answer begins with exactly the ids of
    `prompt`."""

    def __init__(
        self,
        backend: TokenizerBackend,
        scheme: Scheme,
        date_written: date | None = None,
        kwargs: TemplateKwargs = NO_KWARGS,
    ) -> None:
        self._backend = backend
        self._scheme = scheme
        self.date_written = date_written
        """The date in every text, if the template writes one; fixed when this object is made."""
        self.kwargs = kwargs
        """The values of the template's variables that the recipe sets."""
        self.tokenizer: Any = backend.tokenizer
        self.end_ids = scheme.end_ids
        """A completion ends at any of these, and at those of the base's generation config."""
        self.pad_id = backend.pad
        """Any valid id: padding is masked, never recognized by its id."""
        self.fingerprint = self._fingerprint()
        """Changes with anything that changes the ids."""

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        template_date: str | None = None,
        process: RenderProcess | None = None,
        kwargs: TemplateKwargs = NO_KWARGS,
    ) -> ChatTemplate:
        """Returns the tokenizer's own template; without one the kit's if the vocabulary has its control tokens, else
        plain words.

        `template_date` (YYYY-MM-DD) is the date that a template with a date writes. A run passes its own, so that its
        prompts are the same on every day. Default: today, if the template uses the clock. `process` renders it
        (default: the one that all templates share). `kwargs` are values of its variables. Raises UserError if the
        template writes no date, or does not use a variable.
        """
        backend = TokenizerBackend(tokenizer)
        own = default_chat_template(tokenizer)
        date_written = fixed_date(own, template_date)
        check_kwargs(own, kwargs)
        if own is not None:
            return cls(
                backend,
                JinjaChatTemplate(
                    backend,
                    date_written,
                    process,
                    kwargs,
                ),
                date_written,
                kwargs,
            )
        if DefaultTemplate.has_all_special_tokens(backend):
            return cls(backend, DefaultTemplate(backend))
        return cls(backend, PlainTextTemplate(backend))

    @classmethod
    def from_config(cls, tokenizer: Any, data: DataConfig) -> ChatTemplate:
        """Returns the template with the date and the variables of a recipe. Raises UserError as `from_tokenizer`."""
        return cls.from_tokenizer(
            tokenizer,
            data.template_date,
            kwargs=data.chat_template_kwargs,
        )

    def _fingerprint(self) -> str:
        # The description is a part of the keys of all caches: a changed word makes them anew.
        own = getattr(self.tokenizer, "chat_template", None) or ""
        scheme = f"{type(self._scheme).__name__} {self._scheme.description}"
        named = f"{scheme} {self._backend.bos} {self._backend.eos} {own}"
        if self.date_written:
            named += f" {self.date_written}"
        if self.kwargs:
            named += f" {json.dumps(dict(self.kwargs), sort_keys=True)}"
        content = f"{named}\n{self._backend.state}".encode("utf-8", "replace")
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def encode(self, messages: Sequence[Message]) -> Row:
        """Returns the row of the last answer of a conversation. Raises InvalidRow."""
        (row,) = self.encode_many([messages])
        if isinstance(row, InvalidRow):
            raise row
        return row

    def encode_many(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[str] = (),
    ) -> list[RowOrFault]:
        """Returns for each conversation the row of its last answer, which trains all answers whose prompts are its
        beginning; through one call of the tokenizer. `tools` has the tools of each conversation, as in
        `Conversation`."""
        encoded = self._scheme.encode_all(conversations, tools, last_only=True)
        return [rows if isinstance(rows, InvalidRow) else rows[0] for rows in encoded]

    def encode_all(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[str] = (),
    ) -> list[tuple[Row, ...] | InvalidRow]:
        """Returns the rows of each conversation, in which every answer is trained once: that of its last answer, and
        one for each answer that the template rewrites in the turns after it."""
        return self._scheme.encode_all(conversations, tools)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of plain texts: the BOS that the tokenizer adds to a text, if it adds one, the text with
        control tokens as plain characters, and the tokenizer's EOS, if it has one."""
        begin, end = self.text_delimiters
        return [[*begin, *ids, *end] for ids in self._backend.encode_plain(texts)]

    @cached_property
    def text_delimiters(self) -> tuple[list[int], list[int]]:
        """The ids before and after a plain text."""
        bos, eos = self._backend.bos, self._backend.eos
        first = list(self.tokenizer("x")["input_ids"])[:1]
        adds_bos = first == [bos] != self._backend.encode_plain(["x"])[0][:1]
        return first if adds_bos else [], [] if eos is None else [eos]

    def prompt(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """Returns the ids up to the assistant's answer. Raises UserError if `validate_messages` returns a reason,
        because a person may have typed the messages."""
        (ids,) = self.prompt_many([messages], [tools])
        if isinstance(ids, InvalidRow):
            raise UserError(f"the chat template of the base refuses this conversation: {ids.reason}") from ids
        return ids

    def prompt_many(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[str] = (),
    ) -> list[list[int] | InvalidRow]:
        """Returns for each conversation the ids up to the assistant's answer, or the reason of `validate_messages`, in
        far less time than one call for each. Raises UserError if the template itself cannot be used."""
        return self._scheme.prompt_many(conversations, tools)

    def validate_messages(self, messages: Sequence[Message], tools: str = "") -> str | None:
        """Returns why these messages cannot be used with this template; None if they can."""
        return self._scheme.validate_messages(messages, tools)

    def decode(
        self,
        ids: Sequence[int],
        special_tokens: bool = False,
    ) -> str:
        """Returns the text of ids, with control tokens only if `special_tokens`."""
        return self._backend.decode(ids, special_tokens)

    @property
    def lets_model_think(self) -> bool:
        """Whether the template has a switch for thinking, and it is on."""
        return isinstance(self._scheme, JinjaChatTemplate) and self._scheme.lets_model_think

    def special_tokens_in(self, ids: Sequence[int]) -> bool:
        """Returns whether any of these ids is a control token."""
        return not self._backend.control_ids.isdisjoint(ids)

    def is_byte(self, token_id: int) -> bool:
        """Returns whether a token is a single byte (`<0x0A>`), as in tokenizers with byte fallback."""
        return BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "") is not None

    @property
    def turn_delimiters(self) -> re.Pattern[str] | None:
        """What an answer must not contain because it begins another turn, for bases whose markers are plain words; None
        for bases with control tokens."""
        if isinstance(self._scheme, PlainTextTemplate):
            return self._scheme.marker_pattern
        return None

    @property
    def fixed_chat_template(self) -> str:
        """`chat_template` with its variables and its date fixed, so that it renders the trained text on any day."""
        if isinstance(self._scheme, JinjaChatTemplate):
            return self._scheme.fixed_chat_template
        return self.chat_template

    def render(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool,
    ) -> str:
        """Returns the text that other software renders with `fixed_chat_template`. Raises InvalidRow."""
        template = Template(self.fixed_chat_template, self.tokenizer.special_tokens_map)
        (text,) = shared_process().render_some(template, [RenderRequest(messages, add_generation_prompt)])
        if isinstance(text, InvalidRow):
            raise text
        return text

    @property
    def begins_with_bos(self) -> bool:
        """Whether the tokenizer's BOS is the first token of a prompt."""
        return self._backend.bos is not None and self.prompt([Message("user", "?")])[:1] == [self._backend.bos]

    def answer_content(self, text: str) -> str:
        """Returns the text of a completion as the content of a message: with the opening tag, if the prompt opens a
        thought and the text closes it."""
        if not isinstance(self._scheme, JinjaChatTemplate):
            return text
        return self._scheme.generation_prompt.with_tag(text)

    @property
    def chat_template(self) -> str:
        """The same as a Jinja template for other software, which renders a text and then encodes it whole.

        The values of its variables are defaults in it.
        """
        return self._scheme.chat_template

    def describe(self) -> str:
        """Returns one sentence for the start-up line."""
        ends = ", ".join(f"`{self._backend.id_to_token(token_id)}`" for token_id in sorted(self.end_ids))
        description = f"chat text by {self._scheme.description}"
        if self.kwargs:
            values = ", ".join(f"{name}: {json.dumps(value)}" for name, value in self.kwargs.items())
            description += f"; variables {values}"
        if self.date_written:
            description += f"; it writes the date {self.date_written}"
        return f"{description}; an answer ends at {ends}"
