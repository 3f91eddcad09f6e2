"""Text that could change a terminal or a page, and a check of text that is printed."""

from __future__ import annotations

import re

HOSTILE_TEXTS = [
    "\x1b[2J\x1b[H\x1b[31mred",
    "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x9b31m c1 \x84\x85",
    "\u202eright to left\u202c \u2066isolate\u2069 \u200f\u200e\u061c",
    "\r overwritten \b\b\b\x7f \x00 nul",
    "\ud800 lone \udfff",
    "<script>alert(1)</script><img src=http://evil.example onerror=alert(1)>",
    "</script></style></title></svg>]]>--><!--",
    '" onload="x',
    "' x='",
    "&lt;b&gt; &amp; &#x1b;",
    "{{ 1 }} [bold]markup[/bold] [link=http://evil.example]x[/link]",
    "x" * 1_000_000,
    "\ufeff\u2028\u2029\u00ad\u2060",
    "\U000e0041\U000e0042 tags",
    "e\u0301" * 40,
    "\u05d0\u05d1\u05d2 \u0627\u0628",
    "line one\nline two\ttab",
]
CONTROL_CHARACTERS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def is_inert(text: str) -> bool:
    """Returns whether a text has no character that changes the text around it, except the newline."""
    return CONTROL_CHARACTERS.search(text) is None


MAX_CPU_SECONDS = 15.0
"""Seconds of processor time. An immediate result takes a hundredth of them, and a search without end exceeds them, also
on a busy machine."""
