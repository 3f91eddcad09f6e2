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
    RowOrFault,
    text_fault,
)
from lowrank_tune.data.templates.backend import CONTROL_FOUND, TokenizerBackend
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

    def validate_messages(self, messages: ChatMessages) -> str | None:
        """Returns why these messages cannot be rendered; None if they can."""
        return text_fault(messages)

    def prompt_many(self, conversations: Sequence[ChatMessages]) -> list[list[int] | InvalidRow]:
        """Returns the ids up to each answer of the assistant, or the fault."""
        return [self._prompt(messages) for messages in conversations]

    def _prompt(self, messages: ChatMessages) -> list[int] | InvalidRow:
        reason = self.validate_messages(messages)
        if reason is not None:
            return InvalidRow(reason)
        ids, _ = self._join(messages, self.backend.encode_plain(self._texts(messages)))
        return [*ids, *self.ids_before["assistant"]]

    def encode_many(self, conversations: Sequence[ChatMessages]) -> list[RowOrFault]:
        """Returns rows with their masks, through one call of the tokenizer."""
        reasons = [self.validate_messages(messages) for messages in conversations]
        texts: list[str] = []
        for messages, reason in zip(conversations, reasons, strict=True):
            if reason is None:
                texts += self._texts(messages)
        encoded = iter(self.backend.encode_plain(texts))
        rows: list[RowOrFault] = []
        for messages, reason in zip(conversations, reasons, strict=True):
            if reason is not None:
                rows.append(InvalidRow(reason))
                continue
            pieces = [next(encoded) for _ in messages]
            if all(self.backend.control_ids.isdisjoint(piece) for piece in pieces):
                ids, mask = self._join(messages, pieces)
                is_answered = messages[-1].role == "assistant"
                ids += self.conversation_end
                mask += [is_answered] * len(self.conversation_end)
                rows.append(Row(ids, mask))
            else:
                rows.append(InvalidRow(CONTROL_FOUND))
        return rows

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
        marks = ", ".join(f"{role!r}: {token!r}" for role, token in ROLE_TOKENS.items())
        return (
            f"{{% set marks = {{{marks}}} %}}{{{{ {toy_text.BOS!r} }}}}"
            f"{{% for m in messages %}}{{{{ marks[m['role']] + m['content'] + {toy_text.END_OF_TURN!r} }}}}"
            "{% endfor %}"
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
        marks = ", ".join(f"{role!r}: {marker!r}" for role, marker in self.markers.items())
        begin = "" if self.bos is None else "{{ bos_token }}"
        return (
            f"{begin}{{% set marks = {{{marks}}} %}}{{% for m in messages %}}"
            f"{{% if m['role'] == 'assistant' %}}{{{{ {self.assistant_marker!r} + m['content'] + eos_token }}}}"
            "{% elif loop.first %}{{ marks[m['role']].lstrip() + m['content'] }}{% else %}{{ marks[m['role']] + "
            "m['content'] }}{% endif %}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {self.assistant_marker!r} }}}}{{% endif %}}"
        )

    def validate_messages(self, messages: ChatMessages) -> str | None:
        """Returns why these messages cannot be rendered; None if they can."""
        reason = super().validate_messages(messages)
        if reason is not None:
            return reason
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
