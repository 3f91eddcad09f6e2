"""Chat text for bases without a chat template. The text of each message is encoded alone, as plain characters, and the
ids are joined.

`DefaultTemplate`: `bos [system S eot] (user U eot assistant A eot)* eos`, if the vocabulary has the kit's control
tokens.

`PlainTextTemplate`: "User:" and "Assistant:" as words, and the base's own end token after each answer, otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lowrank_tune.batch import Row
from lowrank_tune.data.formats import (
    ChatMessages,
    InvalidRow,
    text_fault,
)
from lowrank_tune.data.message import Message
from lowrank_tune.data.templates.backend import CONTROL_FOUND, TokenizerBackend
from lowrank_tune.data.templates.tool_text import TEXT_MACRO, TOOLS_MACRO, as_text
from lowrank_tune.errors import UserError
from lowrank_tune.toy import text as toy_text

ROLE_TOKENS = {
    "system": toy_text.SYSTEM,
    "user": toy_text.USER,
    "assistant": toy_text.ASSISTANT,
}


class _FallbackTemplate:
    """What both templates share: the ids around the text of each message.

    `ids_before` and `ids_after` have the ids before and after a text, by role; those after an answer are trained.
    `conversation_end` are the ids after the last message.
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        bos: int | None,
        ids_before: Mapping[str, list[int]],
        ids_after: Mapping[str, list[int]],
        conversation_end: Sequence[int] = (),
    ) -> None:
        self.backend = backend
        self.bos = bos
        self.ids_before = ids_before
        self.ids_after = ids_after
        self.conversation_end = conversation_end

    def validate_messages(self, messages: ChatMessages, tools: str = "") -> str | None:
        """Returns why these messages cannot be rendered; None if they can."""
        return text_fault(messages) or self._marker_fault(as_text(messages, tools))

    def _marker_fault(self, messages: ChatMessages) -> str | None:
        """Returns the fault of messages whose text contains what separates messages."""
        return None

    def prompt_many(
        self,
        conversations: Sequence[ChatMessages],
        tools: Sequence[str] = (),
    ) -> list[list[int] | InvalidRow]:
        """Returns the ids up to each answer of the assistant, or the fault."""
        prepared = self._prepare(conversations, tools)
        return [item if isinstance(item, InvalidRow) else self._prompt(item) for item in prepared]

    def _prepare(
        self,
        conversations: Sequence[ChatMessages],
        tools: Sequence[str],
    ) -> list[list[Message] | InvalidRow]:
        """Returns conversations with reasoning and tools as text, or why they cannot be rendered."""
        prepared: list[list[Message] | InvalidRow] = []
        for messages, definitions in zip(conversations, tools or [""] * len(conversations), strict=True):
            reason = self.validate_messages(messages, definitions)
            prepared.append(as_text(messages, definitions) if reason is None else InvalidRow(reason))
        return prepared

    def _prompt(self, messages: ChatMessages) -> list[int]:
        ids, _ = self._join(messages, self.backend.encode_plain(self._texts(messages)))
        return [*ids, *self.ids_before["assistant"]]

    def encode_all(
        self,
        conversations: Sequence[ChatMessages],
        tools: Sequence[str] = (),
        last_only: bool = False,
    ) -> list[tuple[Row, ...] | InvalidRow]:
        """Returns the row of each conversation with its mask, through one call of the tokenizer. One row has all
        answers, so `last_only` changes nothing."""
        prepared = self._prepare(conversations, tools)
        texts: list[str] = []
        for item in prepared:
            if not isinstance(item, InvalidRow):
                texts += self._texts(item)
        encoded = iter(self.backend.encode_plain(texts))
        rows: list[tuple[Row, ...] | InvalidRow] = []
        for item in prepared:
            if isinstance(item, InvalidRow):
                rows.append(item)
                continue
            pieces = [next(encoded) for _ in item]
            if all(self.backend.control_ids.isdisjoint(piece) for piece in pieces):
                rows.append((self._row(item, pieces),))
            else:
                rows.append(InvalidRow(CONTROL_FOUND))
        return rows

    def _row(self, messages: ChatMessages, pieces: Sequence[list[int]]) -> Row:
        ids, mask = self._join(messages, pieces)
        is_answered = messages[-1].role == "assistant"
        return Row(
            [*ids, *self.conversation_end],
            [*mask, *[is_answered] * len(self.conversation_end)],
        )

    def _texts(self, messages: ChatMessages) -> list[str]:
        """Returns the text that is encoded for each message."""
        return [message.content for message in messages]

    def _join(
        self,
        messages: ChatMessages,
        pieces: Sequence[list[int]],
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of the messages, with markers or control tokens, and the mask of those that are trained."""
        ids = [] if self.bos is None else [self.bos]
        mask = [False] * len(ids)
        for message, piece in zip(messages, pieces, strict=True):
            before = self.ids_before.get(message.role, [])
            after = self.ids_after.get(message.role, [])
            is_answer = message.role == "assistant"
            ids += [*before, *piece, *after]
            mask += [False] * len(before) + [is_answer] * len([*piece, *after])
        return ids, mask


class DefaultTemplate(_FallbackTemplate):
    """The kit's own template, by ids."""

    def __init__(self, backend: TokenizerBackend) -> None:
        ids = backend.special_tokens
        eos = ids[toy_text.EOS]
        end_of_turn = ids[toy_text.END_OF_TURN]
        super().__init__(
            backend,
            bos=ids[toy_text.BOS],
            ids_before={role: [ids[token]] for role, token in ROLE_TOKENS.items()},
            ids_after=dict.fromkeys(ROLE_TOKENS, [end_of_turn]),
            conversation_end=[eos],
        )
        self.end_ids = frozenset({eos, end_of_turn})
        self.description = "the kit's own template"

    @property
    def chat_template(self) -> str:
        """The same as a Jinja template for other software. Control tokens separate the texts, so the ids are equal."""
        marks = ", ".join(f"{role!r}: {token!r}" for role, token in [*ROLE_TOKENS.items(), ("tool", toy_text.USER)])
        end = repr(toy_text.END_OF_TURN)
        return (
            f"{TEXT_MACRO}{TOOLS_MACRO}"
            f"{{% set marks = {{{marks}}} %}}{{{{ {toy_text.BOS!r} }}}}"
            f"{{% if tools and messages[0]['role'] != 'system' %}}"
            f"{{{{ {toy_text.SYSTEM!r} + tools_text() + {end} }}}}{{% endif %}}"
            "{% for m in messages %}{{ marks[m['role']] + text(m) }}"
            "{{ '\\n\\n' + tools_text() if tools and loop.first and m['role'] == 'system' else '' }}"
            f"{{{{ {end} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {toy_text.ASSISTANT!r} }}}}{{% endif %}}"
        )

    @staticmethod
    def has_all_special_tokens(backend: TokenizerBackend) -> bool:
        """Returns whether the vocabulary has all control tokens of the template."""
        return {*toy_text.CONTROL_TOKENS} - {toy_text.PAD} <= backend.special_tokens.keys()


class PlainTextTemplate(_FallbackTemplate):
    """Plain words as markers. They are ordinary text, so a row whose own text contains one is unusable."""

    def __init__(self, backend: TokenizerBackend) -> None:
        if backend.eos is None:
            raise UserError(
                "the base's tokenizer has neither a chat template nor an end token, so no answer could ever end"
            )
        if _has_no_newline(backend):
            before, after = "", " "
            line_start = r"\b"
        else:
            before, after = "\n\n", "\n"
            line_start = r"^[ \t]*"
        self.markers = {role: f"{before}{role.title()}:{after}" for role in ROLE_TOKENS}
        self.assistant_marker = self.markers["assistant"].rstrip(" ")
        super().__init__(
            backend,
            backend.bos,
            ids_before={"assistant": backend.encode_plain([self.assistant_marker])[0]},
            ids_after={"assistant": [backend.eos]},
        )
        self.marker_pattern = re.compile(rf"{line_start}(?:System|User|Assistant):", re.MULTILINE)
        self.end_ids = frozenset({backend.eos})
        self.description = (
            f"plain words ({self.markers['user']!r}, {self.markers['assistant']!r}), because the base has no chat "
            f"template; "
            "rows whose own text holds such a marker are dropped"
        )

    @property
    def chat_template(self) -> str:
        """The same as a Jinja template for other software, which encodes the text whole.

        The ids may then differ, with the same words: a base may have a token for a line break of a marker and what
        precedes it.
        """
        named = [*self.markers.items(), ("tool", self.markers["user"])]
        marks = ", ".join(f"{role!r}: {marker!r}" for role, marker in named)
        begin = "" if self.bos is None else "{{ bos_token }}"
        return (
            f"{TEXT_MACRO}{TOOLS_MACRO}{begin}{{% set marks = {{{marks}}} %}}"
            "{% set listed = tools and messages[0]['role'] != 'system' %}"
            "{% if listed %}{{ marks['system'].lstrip() + tools_text() }}{% endif %}{% for m in messages %}"
            f"{{% if m['role'] == 'assistant' %}}{{{{ {self.assistant_marker!r} + text(m) + eos_token }}}}"
            "{% elif loop.first and not listed %}{{ marks[m['role']].lstrip() + text(m) }}"
            "{% else %}{{ marks[m['role']] + text(m) }}{% endif %}"
            "{{ '\\n\\n' + tools_text() if tools and loop.first and m['role'] == 'system' else '' }}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {self.assistant_marker!r} }}}}{{% endif %}}"
        )

    def _marker_fault(self, messages: ChatMessages) -> str | None:
        for message in messages:
            # The search is slow, and most texts have no colon.
            if ":" not in message.content:
                continue
            match = self.marker_pattern.search(message.content)
            if match is not None:
                return f"its text contains the marker `{match.group().strip()}`"
        return None

    def _texts(self, messages: ChatMessages) -> list[str]:
        """Returns the text that is encoded for each message: an answer without its marker, so that its ids do not
        depend on what precedes it."""
        texts = []
        for message in messages:
            if message.role == "assistant":
                texts.append(message.content)
            else:
                texts.append(self.markers[message.role] + message.content)
        if texts and messages[0].role != "assistant":
            texts[0] = texts[0].lstrip("\n")
        return texts


def _has_no_newline(backend: TokenizerBackend) -> bool:
    """Returns whether a newline is an unknown token, as in some vocabularies of single characters."""
    unknown = backend.tokenizer.unk_token_id
    return unknown is not None and unknown != backend.eos and unknown in backend.encode_plain(["\n"])[0]
