"""Screens: sinks that show events to a person. What all of them need to show text that a model or a data file wrote."""

from __future__ import annotations

import re

# Everything that moves the cursor, breaks the line, reorders or hides its neighbors. The joiners U+200C and U+200D
# stay: Persian and emoji need them, and they can do no harm.
_CONTROL_CHARS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_SHORT_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def escape_control_chars(text: str, limit: int | None = None) -> str:
    """The text in one line, with control and bidi characters and lone surrogates escaped; shortened to `limit`
    characters."""
    if limit is not None and len(text) > 8 * limit:  # a line of a megabyte is not searched to its end
        text = text[: 8 * limit]
    text = _CONTROL_CHARS.sub(_escaped, text)
    if limit is None or len(text) <= limit:
        return text
    return text[: max(0, limit - 3)] + "..."


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return _SHORT_ESCAPES.get(match[0]) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )
