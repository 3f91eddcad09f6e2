"""Screens and pages that show a run. All of them escape text of a model or a data file by `escape_control_chars`."""

from __future__ import annotations

import re

# Characters that move the cursor, break the line, or reorder or hide other characters. The joiners U+200C and U+200D
# are harmless, and Persian and emoji need them.
_CONTROL_CHARS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_SHORT_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def escape_control_chars(text: str, limit: int | None = None) -> str:
    """Returns the text in one line, with control and bidi characters and lone surrogates escaped, cut to `limit`
    characters."""
    if limit is not None:
        # a text of megabytes is not searched to its end
        text = text[: 8 * limit]
    text = _CONTROL_CHARS.sub(_escaped, text)
    if limit is None or len(text) <= limit:
        return text
    return text[: max(0, limit - 3)] + "..."


def _escaped(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    if char in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[char]
    if code < 0x100:
        return f"\\x{code:02x}"
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\U{code:08x}"
