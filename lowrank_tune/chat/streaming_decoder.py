"""Text as it grows token by token: never half a character, and never the marker with which a base of plain words begins
another turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

REPLACEMENT_CHAR = "\ufffd"  # how tokenizers write bytes that are no character, or not yet one
ROLE_MARKERS = ("System:", "User:", "Assistant:")
MARKER_LOOKBACK = 48  # characters in which the beginning of a marker is looked for


class IncrementalDecoder:
    """Decodes a stream of tokens. `add` returns the text that later tokens cannot change; the texts of `add` and
    `flush` together are `decode` of all tokens.

    With `turn`, the text ends where that pattern is found, and `turned` is True. `is_byte` is True for tokens that are
    single bytes: a run of these is decoded as a whole, because a later one can change the text of those before it.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        turn: re.Pattern[str] | None = None,
        is_byte: Callable[[int], bool] | None = None,
    ) -> None:
        self.decode = decode
        self.turn = turn
        self.turned = False
        self._is_byte = is_byte
        self._ids: list[int] = []
        # Tokens from `_context` on are decoded anew each time, for a first token may lose its space; those up to
        # `_read` have been told.
        self._context = 0
        self._read = 0
        self._text = ""
        self._emitted = 0

    def add(self, token: int) -> str:
        """The next piece, often an empty one."""
        self._ids.append(token)
        if self._is_byte is not None and self._is_byte(token):
            return ""
        before = self.decode(self._ids[self._context : self._read])
        now = self.decode(self._ids[self._context :])
        if len(now) > len(before) and not now.endswith(REPLACEMENT_CHAR):
            self._text += now[len(before) :]
            self._context, self._read = self._read, len(self._ids)
        return self._emit_upto(self._stable_prefix())

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        if not self.turned:
            self._text += self.decode(self._ids[self._context :])[
                len(self.decode(self._ids[self._context : self._read])) :
            ]
            self._context = self._read = len(self._ids)
        end = self._end()
        return self._emit_upto(len(self._text) if end is None else end)

    @property
    def text(self) -> str:
        """What was told so far."""
        return self._text[: self._emitted]

    def _emit_upto(self, upto: int) -> str:
        piece = self._text[self._emitted : max(upto, self._emitted)]
        self._emitted += len(piece)
        return piece

    def _end(self) -> int | None:
        """Where another turn begins."""
        match = self.turn.search(self._text) if self.turn is not None else None
        if match is None:
            return None
        self.turned = True
        return len(self._text[: match.start()].rstrip())

    def _stable_prefix(self) -> int:
        """How far the text cannot turn out to be the beginning of a marker."""
        if self.turn is None:
            return len(self._text)
        if (end := self._end()) is not None:
            return end
        tail = self._text[-MARKER_LOOKBACK:]
        for word in ROLE_MARKERS:
            for length in range(len(word) - 1, 0, -1):
                if tail.endswith(word[:length]) and (match := self.turn.search(tail + word[length:])):
                    return len(self._text) - len(tail) + len(tail[: match.start()].rstrip())
        return len(self._text.rstrip()) if tail else 0  # blank lines may stand before a marker
