"""User interfaces: screens, logs and reports of events. This module makes untrusted text safe for a terminal."""

from __future__ import annotations

import re
from typing import TextIO

# Characters that move the cursor, break the line, or reorder or hide their neighbors. The joiners U+200C and U+200D are
# allowed: Persian and emoji need them, and they are harmless.
_CONTROL_CHARS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_SHORT_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def escape_control_chars(text: str, limit: int | None = None) -> str:
    """Returns the text in one line, with control characters, bidirectional marks and lone surrogates escaped; shortened
    to `limit` characters."""
    if limit is not None and len(text) > 8 * limit:
        # a very long line is not searched to its end
        text = text[: 8 * limit]
    text = _CONTROL_CHARS.sub(_escaped, text)
    if limit is None or len(text) <= limit:
        return text
    return text[: max(0, limit - 3)] + "..."


def mark_line_breaks(text: str, ascii_only: bool = False) -> str:
    """Returns a prompt or an answer in one line: each line break is shown as a sign."""
    sign = " | " if ascii_only else "\u23ce "
    return text.replace("\r\n", "\n").replace("\n", sign)


def escape_lines(text: str) -> str:
    """Returns text without control characters, except for its line breaks."""
    return "\n".join(escape_control_chars(line) for line in text.split("\n"))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\U{code:08x}"


def is_ascii(file: TextIO) -> bool:
    """Returns whether the encoding of a file has ASCII only."""
    return encodable("\u23ce", file).isascii()


def encodable(text: str, file: TextIO) -> str:
    """Returns the text with characters escaped that the encoding of the file does not have."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
