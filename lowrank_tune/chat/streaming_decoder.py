"""Incremental decoding of tokens to text, without incomplete characters and without role markers of another turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# tokenizers decode bytes that are not a complete character to this
REPLACEMENT_CHAR = "\ufffd"
ROLE_MARKERS = ("System:", "User:", "Assistant:")
# number of characters at the end of the text that are searched for the beginning of a marker
MARKER_LOOKBACK = 48


@dataclass
class IncrementalDecoder:
    """Decodes a stream of tokens. `add` returns the text that later tokens cannot change; the texts of `add` and
    `flush` together are `decode` of all tokens.

    With `turn`, the text ends where that pattern is found, and `turned` is True. `is_byte` is True for tokens that are
    single bytes: a run of these is decoded as a whole, because a later one can change the text of those before it.
    """

    decode: Callable[[Sequence[int]], str]
    turn: re.Pattern[str] | None = None
    is_byte: Callable[[int], bool] | None = None
    turned: bool = False
    _ids: list[int] = field(default_factory=list)
    # Tokens from `_context` on are decoded again each time, because a first token may lose its space. The text of the
    # tokens before `_read` is in `_text`.
    _context: int = 0
    _read: int = 0
    _text: str = ""
    _emitted: int = 0

    def add(self, token: int) -> str:
        """Adds a token and returns the new text, which is often empty."""
        self._ids.append(token)
        if self.is_byte is not None and self.is_byte(token):
            return ""
        new = self._unread_text()
        if new and not new.endswith(REPLACEMENT_CHAR):
            self._text += new
            self._context, self._read = self._read, len(self._ids)
        return self._emit_upto(self._stable_prefix())

    def flush(self) -> str:
        """Returns the rest of the text, after the last token."""
        if not self.turned:
            self._text += self._unread_text()
            self._context = self._read = len(self._ids)
        end = self._end()
        return self._emit_upto(len(self._text) if end is None else end)

    def _unread_text(self) -> str:
        """Returns the text of the tokens from `_read` on."""
        before = self.decode(self._ids[self._context : self._read])
        now = self.decode(self._ids[self._context :])
        return now[len(before) :]

    @property
    def text(self) -> str:
        """The text returned so far."""
        return self._text[: self._emitted]

    def _emit_upto(self, upto: int) -> str:
        piece = self._text[self._emitted : max(upto, self._emitted)]
        self._emitted += len(piece)
        return piece

    def _end(self) -> int | None:
        """Returns the length of the text before another turn, None if there is none."""
        match = self.turn.search(self._text) if self.turn is not None else None
        if match is None:
            return None
        self.turned = True
        return len(self._text[: match.start()].rstrip())

    def _stable_prefix(self) -> int:
        """Returns the length of the text that cannot become a part of a marker with later tokens."""
        if self.turn is None:
            return len(self._text)
        end = self._end()
        if end is not None:
            return end
        tail = self._text[-MARKER_LOOKBACK:]
        for word in ROLE_MARKERS:
            for length in range(len(word) - 1, 0, -1):
                if not tail.endswith(word[:length]):
                    continue
                match = self.turn.search(tail + word[length:])
                if match:
                    return len(self._text) - len(tail) + len(tail[: match.start()].rstrip())
        # blank lines can be before a marker
        return len(self._text.rstrip()) if tail else 0
