"""Chat text for bases without a template of their own. Each turn's content is encoded alone, as plain characters, and
joined by ids.

`DefaultTemplate`: `bos [system S eot] (user U eot assistant A eot)* eos`, where the vocabulary has the kit's control
tokens.

`PlainTextTemplate`: "User:", "Assistant:" as words, and the base's own end token after each answer, where it has not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lowrank_tune.batch import Row
from lowrank_tune.data.formats import InvalidRow, is_text
from lowrank_tune.data.message import Message
from lowrank_tune.data.tokenizer_backend import TokenizerBackend
from lowrank_tune.errors import UserError
from lowrank_tune.toy import text as toy_text

ChatMessages = Sequence[Message]
NOT_TEXT = "half of a surrogate pair, which is no character"
CONTROL_FOUND = "a control token of the base that could not be read as plain text"


class DefaultTemplate:
    """The kit's own template, by ids."""

    def __init__(self, backend: TokenizerBackend) -> None:
        self.backend = backend
        mark = backend.special_tokens
        self.bos = mark[toy_text.BOS]
        self.eos = mark[toy_text.EOS]
        self.end_of_turn = mark[toy_text.END_OF_TURN]
        self.role_ids = {
            "system": mark[toy_text.SYSTEM],
            "user": mark[toy_text.USER],
            "assistant": mark[toy_text.ASSISTANT],
        }
        self.end_ids = frozenset({self.eos, self.end_of_turn})
        self.description = "the kit's own template"

    @property
    def chat_template(self) -> str:
        """The same for software that knows chat templates: text and control tokens stand apart, so the ids are the
        same."""
        marks = f"'system': {toy_text.SYSTEM!r}, 'user': {toy_text.USER!r}, 'assistant': {toy_text.ASSISTANT!r}"
        return (
            f"{{% set marks = {{{marks}}} %}}{{{{ {toy_text.BOS!r} }}}}"
            f"{{% for m in messages %}}{{{{ marks[m['role']] + m['content'] + {toy_text.END_OF_TURN!r} }}}}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {toy_text.ASSISTANT!r} }}}}{{% endif %}}"
        )

    @staticmethod
    def has_all_special_tokens(backend: TokenizerBackend) -> bool:
        """Whether the vocabulary has all the marks."""
        return all(mark in backend.special_tokens for mark in toy_text.CONTROL_TOKENS if mark != toy_text.PAD)

    def validate_messages(self, messages: ChatMessages) -> str | None:
        """Why these turns cannot be rendered; None where they can."""
        if all(is_text(message.content) for message in messages):
            return None
        return NOT_TEXT

    def prompt(self, messages: ChatMessages) -> list[int]:
        """Ids up to the place where the assistant starts."""
        return [
            *self._join(messages, self.backend.encode_plain([message.content for message in messages]))[0],
            self.role_ids["assistant"],
        ]

    def encode_many(self, rows: Sequence[ChatMessages]) -> list[Row | InvalidRow]:
        """Rows with their masks, through one call of the tokenizer."""

        def to_row(row: ChatMessages, pieces: Sequence[list[int]]) -> Row:
            ids, mask = self._join(row, pieces)
            return Row([*ids, self.eos], [*mask, row[-1].role == "assistant"])

        return _encode(
            self.backend,
            rows,
            self.validate_messages,
            lambda row: [message.content for message in row],
            to_row,
        )

    def _join(self, messages: ChatMessages, pieces: Sequence[list[int]]) -> tuple[list[int], list[bool]]:
        ids = [self.bos]
        mask = [False]
        for message, piece in zip(messages, pieces, strict=True):
            ids.append(self.role_ids[message.role])
            ids += piece
            ids.append(self.end_of_turn)
            mask.append(False)
            mask += [message.role == "assistant"] * (len(piece) + 1)
        return ids, mask


class PlainTextTemplate:
    """Plain-word markers. They are ordinary text, so a row whose own text holds one is unusable."""

    def __init__(self, backend: TokenizerBackend) -> None:
        if backend.eos is None:
            raise UserError(
                "the base's tokenizer has neither a chat template nor an end token, so no answer could ever end"
            )
        self.backend = backend
        self.bos = backend.bos
        self.eos = backend.eos
        unknown = backend.tokenizer.unk_token_id
        # A vocabulary of single characters may lack the newline: then the markers stand inline.
        is_inline = unknown is not None and unknown != self.eos and unknown in backend.encode_plain(["\n"])[0]
        before, after = ("", "") if is_inline else ("\n\n", "\n")
        self.markers = {role: f"{before}{role.title()}:{after or ' '}" for role in ("system", "user", "assistant")}
        self.assistant_ids = backend.encode_plain([self.markers["assistant"].rstrip(" ")])[0]
        self.marker_pattern = re.compile(
            r"\b(?:System|User|Assistant):" if is_inline else r"^[ \t]*(?:System|User|Assistant):", re.MULTILINE
        )
        self.end_ids = frozenset({self.eos})
        self.description = (
            f"plain words ({self.markers['user']!r}, {self.markers['assistant']!r}), because the base has no chat "
            f"template; "
            "rows whose own text holds such a marker are dropped"
        )

    @property
    def chat_template(self) -> str:
        """The same for software that knows chat templates. It encodes the text whole: a base whose tokens join a
        marker's line break with what stands before may then see other ids there, and the same words."""
        marks = ", ".join(f"{role!r}: {marker!r}" for role, marker in self.markers.items())
        assistant_marker = self.markers["assistant"].rstrip(" ")
        return (
            ("" if self.bos is None else "{{ bos_token }}")
            + f"{{% set marks = {{{marks}}} %}}{{% for m in messages %}}"
            f"{{% if m['role'] == 'assistant' %}}{{{{ {assistant_marker!r} + m['content'] + eos_token }}}}"
            "{% elif loop.first %}{{ marks[m['role']].lstrip() + m['content'] }}{% else %}{{ marks[m['role']] + "
            "m['content'] }}{% endif %}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {assistant_marker!r} }}}}{{% endif %}}"
        )

    def validate_messages(self, messages: ChatMessages) -> str | None:
        """Why these turns cannot be rendered; None where they can."""
        if not all(is_text(message.content) for message in messages):
            return NOT_TEXT
        for message in messages:
            # Both parts of the test are needed: the search is slow, and most texts hold none of the words.
            if ":" in message.content and (match := self.marker_pattern.search(message.content)):
                return f"its text holds the marker `{match.group().strip()}`"
        return None

    def prompt(self, messages: ChatMessages) -> list[int]:
        """Ids up to the place where the assistant starts."""
        if reason := self.validate_messages(messages):
            raise InvalidRow(reason)
        return [*self._join(messages, self.backend.encode_plain(self._texts(messages)))[0], *self.assistant_ids]

    def encode_many(self, rows: Sequence[ChatMessages]) -> list[Row | InvalidRow]:
        """Rows with their masks, through one call of the tokenizer."""
        return _encode(
            self.backend,
            rows,
            self.validate_messages,
            self._texts,
            lambda row, pieces: Row(*self._join(row, pieces)),
        )

    def _texts(self, messages: ChatMessages) -> list[str]:
        """What is encoded for each turn: the assistant's words stand alone, so that they are the same ids whatever
        stands before."""
        texts = [
            message.content if message.role == "assistant" else self.markers[message.role] + message.content
            for message in messages
        ]
        if texts and messages[0].role != "assistant":
            texts[0] = texts[0].lstrip("\n")
        return texts

    def _join(self, messages: ChatMessages, pieces: Sequence[list[int]]) -> tuple[list[int], list[bool]]:
        ids = [] if self.bos is None else [self.bos]
        mask = [False] * len(ids)
        for message, piece in zip(messages, pieces, strict=True):
            if message.role != "assistant":
                ids += piece
                mask += [False] * len(piece)
                continue
            ids += [*self.assistant_ids, *piece, self.eos]
            mask += [False] * len(self.assistant_ids) + [True] * (len(piece) + 1)
        return ids, mask


def _encode(
    backend: TokenizerBackend,
    rows: Sequence[ChatMessages],
    validate: Callable[[ChatMessages], str | None],
    texts_of: Callable[[ChatMessages], list[str]],
    join: Callable[[ChatMessages, Sequence[list[int]]], Row],
) -> list[Row | InvalidRow]:
    """All texts of all rows through one call of the tokenizer, then each row joined from its own pieces."""
    faults = [validate(row) for row in rows]
    pieces = iter(
        backend.encode_plain(
            [text for row, fault in zip(rows, faults, strict=True) if not fault for text in texts_of(row)]
        )
    )
    out: list[Row | InvalidRow] = []
    for row, fault in zip(rows, faults, strict=True):
        own = [] if fault else [next(pieces) for _ in row]
        if not fault and not all(backend.control_ids.isdisjoint(piece) for piece in own):
            fault = CONTROL_FOUND
        out.append(InvalidRow(fault) if fault else join(row, own))
    return out
