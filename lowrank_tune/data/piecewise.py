"""Chat text for bases without a template of their own. Each turn's content is encoded alone, as plain characters, and
joined by ids.

`KitMarks`: `bos [system S eot] (user U eot assistant A eot)* eos`, where the vocabulary has the kit's control tokens.
`PlainWords`: "User:", "Assistant:" as words, and the base's own end token after each answer, where it has not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lowrank_tune.data.backend import Backend
from lowrank_tune.data.formats import RowFault, is_text
from lowrank_tune.errors import UserError
from lowrank_tune.tutor import text as kit
from lowrank_tune.types import Message, Row

Talk = Sequence[Message]
NOT_TEXT = "half of a surrogate pair, which is no character"
CONTROL_FOUND = "a control token of the base that could not be read as plain text"


class KitMarks:
    """The kit's own template, by ids."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        mark = backend.specials
        self.bos, self.eos, self.end_of_turn = mark[kit.BOS], mark[kit.EOS], mark[kit.END_OF_TURN]
        self.roles = {"system": mark[kit.SYSTEM], "user": mark[kit.USER], "assistant": mark[kit.ASSISTANT]}
        self.end_ids = frozenset({self.eos, self.end_of_turn})
        self.about = "the kit's own template"

    @property
    def jinja(self) -> str:
        """The same for software that knows chat templates: text and control tokens stand apart, so the ids are the
        same."""
        marks = f"'system': {kit.SYSTEM!r}, 'user': {kit.USER!r}, 'assistant': {kit.ASSISTANT!r}"
        return (
            f"{{% set marks = {{{marks}}} %}}{{{{ {kit.BOS!r} }}}}"
            f"{{% for m in messages %}}{{{{ marks[m['role']] + m['content'] + {kit.END_OF_TURN!r} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {kit.ASSISTANT!r} }}}}{{% endif %}}"
        )

    @staticmethod
    def fits(backend: Backend) -> bool:
        """Whether the vocabulary has all the marks."""
        return all(mark in backend.specials for mark in kit.CONTROL_TOKENS if mark != kit.PAD)

    def spoils(self, messages: Talk) -> str | None:
        """Why these turns cannot be rendered; None where they can."""
        return None if all(is_text(message.content) for message in messages) else NOT_TEXT

    def prompt(self, messages: Talk) -> list[int]:
        """Ids up to the place where the assistant starts."""
        return [
            *self._join(messages, self.backend.encode_plain([message.content for message in messages]))[0],
            self.roles["assistant"],
        ]

    def encode_many(self, rows: Sequence[Talk]) -> list[Row | RowFault]:
        """Rows with their masks, through one call of the tokenizer."""

        def whole(row: Talk, pieces: Sequence[list[int]]) -> Row:
            ids, says = self._join(row, pieces)
            return Row([*ids, self.eos], [*says, row[-1].role == "assistant"])

        return _encode(self.backend, rows, self.spoils, lambda row: [message.content for message in row], whole)

    def _join(self, messages: Talk, pieces: Sequence[list[int]]) -> tuple[list[int], list[bool]]:
        ids, says = [self.bos], [False]
        for message, piece in zip(messages, pieces, strict=True):
            ids.append(self.roles[message.role])
            ids += piece
            ids.append(self.end_of_turn)
            says.append(False)
            says += [message.role == "assistant"] * (len(piece) + 1)
        return ids, says


class PlainWords:
    """Plain-word markers. They are ordinary text, so a row whose own text holds one is unusable."""

    def __init__(self, backend: Backend) -> None:
        if backend.eos is None:
            raise UserError(
                "the base's tokenizer has neither a chat template nor an end token, so no answer could ever end"
            )
        self.backend = backend
        self.bos, self.eos = backend.bos, backend.eos
        unknown = backend.tokenizer.unk_token_id
        # A vocabulary of single characters may lack the newline: then the markers stand inline.
        inline = unknown is not None and unknown != self.eos and unknown in backend.encode_plain(["\n"])[0]
        before, after = ("", "") if inline else ("\n\n", "\n")
        self.markers = {role: f"{before}{role.title()}:{after or ' '}" for role in ("system", "user", "assistant")}
        self.assistant = backend.encode_plain([self.markers["assistant"].rstrip(" ")])[0]
        self.marker_pattern = re.compile(
            r"\b(?:System|User|Assistant):" if inline else r"^[ \t]*(?:System|User|Assistant):", re.MULTILINE
        )
        self.end_ids = frozenset({self.eos})
        self.about = (
            f"plain words ({self.markers['user']!r}, {self.markers['assistant']!r}), because the base has no chat "
            f"template; "
            "rows whose own text holds such a marker are dropped"
        )

    @property
    def jinja(self) -> str:
        """The same for software that knows chat templates. It encodes the text whole: a base whose tokens join a
        marker's line break with what stands before may then see other ids there, and the same words."""
        marks = ", ".join(f"{role!r}: {marker!r}" for role, marker in self.markers.items())
        asks = self.markers["assistant"].rstrip(" ")
        return (
            ("" if self.bos is None else "{{ bos_token }}")
            + f"{{% set marks = {{{marks}}} %}}{{% for m in messages %}}"
            f"{{% if m['role'] == 'assistant' %}}{{{{ {asks!r} + m['content'] + eos_token }}}}"
            "{% elif loop.first %}{{ marks[m['role']].lstrip() + m['content'] }}{% else %}{{ marks[m['role']] + "
            "m['content'] }}{% endif %}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {asks!r} }}}}{{% endif %}}"
        )

    def spoils(self, messages: Talk) -> str | None:
        """Why these turns cannot be rendered; None where they can."""
        if not all(is_text(message.content) for message in messages):
            return NOT_TEXT
        for message in messages:
            # Both parts of the test are needed: the search is slow, and most texts hold none of the words.
            if ":" in message.content and (found := self.marker_pattern.search(message.content)):
                return f"its text holds the marker `{found.group().strip()}`"
        return None

    def prompt(self, messages: Talk) -> list[int]:
        """Ids up to the place where the assistant starts."""
        if reason := self.spoils(messages):
            raise RowFault(reason)
        return [*self._join(messages, self.backend.encode_plain(self._texts(messages)))[0], *self.assistant]

    def encode_many(self, rows: Sequence[Talk]) -> list[Row | RowFault]:
        """Rows with their masks, through one call of the tokenizer."""
        return _encode(self.backend, rows, self.spoils, self._texts, lambda row, pieces: Row(*self._join(row, pieces)))

    def _texts(self, messages: Talk) -> list[str]:
        """What is encoded for each turn: the assistant's words stand alone, so that they are the same ids whatever
        stands before."""
        texts = [
            message.content if message.role == "assistant" else self.markers[message.role] + message.content
            for message in messages
        ]
        if texts and messages[0].role != "assistant":
            texts[0] = texts[0].lstrip("\n")
        return texts

    def _join(self, messages: Talk, pieces: Sequence[list[int]]) -> tuple[list[int], list[bool]]:
        ids = [] if self.bos is None else [self.bos]
        says = [False] * len(ids)
        for message, piece in zip(messages, pieces, strict=True):
            if message.role != "assistant":
                ids += piece
                says += [False] * len(piece)
                continue
            ids += [*self.assistant, *piece, self.eos]
            says += [False] * len(self.assistant) + [True] * (len(piece) + 1)
        return ids, says


def _encode(
    backend: Backend,
    rows: Sequence[Talk],
    spoils: Callable[[Talk], str | None],
    texts_of: Callable[[Talk], list[str]],
    join: Callable[[Talk, Sequence[list[int]]], Row],
) -> list[Row | RowFault]:
    """All texts of all rows through one call of the tokenizer, then each row joined from its own pieces."""
    faults = [spoils(row) for row in rows]
    pieces = iter(
        backend.encode_plain(
            [text for row, fault in zip(rows, faults, strict=True) if not fault for text in texts_of(row)]
        )
    )
    out: list[Row | RowFault] = []
    for row, fault in zip(rows, faults, strict=True):
        mine = [] if fault else [next(pieces) for _ in row]
        if not fault and not all(backend.control.isdisjoint(piece) for piece in mine):
            fault = CONTROL_FOUND
        out.append(RowFault(fault) if fault else join(row, mine))
    return out
