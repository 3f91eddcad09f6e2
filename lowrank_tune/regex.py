r"""The regular expressions of recipes, by RE2: time linear in the text, whatever the pattern, so no completion can hang
one.

RE2 has no lookaround, backreferences, atomic groups or possessive repetitions, and counts up to 1000. It differs from
Python's `re` also in `\d`, `\w`, `\s` and `\b`, which are ASCII (`\pL` is any letter, `\pN` any number), in `$`, which
is the very end of the text (`(?m)`: of a line), and in `\z` for Python's `\Z`.
"""

from __future__ import annotations

from typing import Any

import re2

from lowrank_tune.errors import UserError

UNSUPPORTED_SYNTAX = (
    (
        ("(?=", "(?!", "(?<=", "(?<!"),
        "lookaround",
        "match what stands there too, or use two rewards, one with a negative weight,",
    ),
    (
        ("(?>", "*+", "++", "?+", "}+"),
        "atomic groups and possessive repetitions",
        "write plain ones, which cannot run away here,",
    ),
    (("(?P=", r"\1", r"\2", r"\3"), "backreferences", "write the alternatives out,"),
    ((r"\Z",), r"`\Z`", r"write `\z`,"),
    ((r"\u", r"\U", r"\N"), "escapes of this kind", r"write the character itself or `\x{20ac}`,"),
)
"""What people write that RE2 does not know: how it looks, what it is called, and what to do."""


def compile_pattern(pattern: str) -> Any:
    """An RE2 expression for UTF-8 bytes (see `encoded`). Raises UserError with a sentence that begins like `is no
    ...`."""
    options = re2.Options()
    options.log_errors = False  # RE2 would write to the terminal by itself
    options.never_capture = True
    try:
        return re2.compile(pattern.encode(), options)
    except UnicodeEncodeError:
        raise UserError("is no text that UTF-8 can hold") from None
    except re2.error as error:
        raise UserError(_explain_error(pattern, error)) from None


def _explain_error(pattern: str, error: Exception) -> str:
    message = error.args[0] if error.args else ""
    if isinstance(message, bytes):
        message = message.decode(errors="replace")
    else:
        message = str(message)
    for signs, name, fix in UNSUPPORTED_SYNTAX:
        if any(sign in message for sign in signs) or (
            message.endswith("(?P") and "(?P=" in pattern and "(?P=" in signs
        ):
            return (
                f"has {name}, which the linear-time engine RE2 does not know; {fix} or your own function, "
                f"`./file.py:name`"
            )
    return f"is no regular expression of RE2: {message if message.isprintable() else ascii(message)}"[:200]


def to_utf8(text: str) -> bytes:
    """A completion as UTF-8; a lone surrogate, which no UTF-8 can hold, becomes the replacement character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
