r"""The regular expressions of recipes, by RE2: their time is linear in the text, whatever the pattern, so that no
completion can take forever.

RE2 has no lookaround, backreferences, atomic groups or possessive repetitions, and counts up to 1000. It differs from
Python's `re` also in `\d`, `\w`, `\s` and `\b`, which are ASCII (`\pL` is any letter, `\pN` any number), in `$`, which
is the very end of the text (`(?m)`: of a line), and in `\z` for Python's `\Z`.
"""

from __future__ import annotations

from typing import Any

from lowrank_tune.errors import UserError

MAX_BYTES = 8 << 20
"""RE2's own limit for a compiled expression."""
UNSUPPORTED_SYNTAX = (
    (
        ("(?=", "(?!", "(?<=", "(?<!"),
        "lookaround",
        "match that text too, or use two rewards, one with a negative weight,",
    ),
    (
        ("(?>", "*+", "++", "?+", "}+"),
        "atomic groups and possessive repetitions",
        "write plain ones, which take linear time here,",
    ),
    (("(?P=", r"\1", r"\2", r"\3"), "backreferences", "write the alternatives out,"),
    ((r"\Z",), r"`\Z`", r"write `\z`,"),
    ((r"\u", r"\U", r"\N"), "escapes of this kind", r"write the character itself or `\x{20ac}`,"),
)
"""Syntax that RE2 does not support: the characters, the name, and what to do."""


def compile_pattern(
    pattern: str,
    max_bytes: int = MAX_BYTES,
    captures: bool = False,
) -> Any:
    """Returns an RE2 expression for UTF-8 bytes (see `to_utf8`), of at most `max_bytes` in memory, whose groups are
    kept only with `captures`. Raises UserError with a message whose subject is the pattern, such as `is not a regular
    expression`."""
    # Algorithms without patterns run where RE2 is not installed (benchmarks/gpu.py).
    import re2

    options = re2.Options()
    # RE2 would write to the terminal by itself.
    options.log_errors = False
    options.never_capture = not captures
    options.max_mem = max_bytes
    try:
        return re2.compile(pattern.encode(), options)
    except UnicodeEncodeError:
        raise UserError("cannot be encoded as UTF-8") from None
    except re2.error as error:
        raise UserError(_explain_error(pattern, error)) from None


def _explain_error(pattern: str, error: Exception) -> str:
    message = error.args[0] if error.args else ""
    if isinstance(message, bytes):
        message = message.decode(errors="replace")
    else:
        message = str(message)
    # RE2's message contains the unsupported syntax. That of a backreference by name ends before the name.
    if message.endswith("(?P") and "(?P=" in pattern:
        message += "="
    for signs, name, fix in UNSUPPORTED_SYNTAX:
        if any(sign in message for sign in signs):
            return (
                f"has {name}, which the linear-time engine RE2 does not support; {fix} or your own function, "
                f"`./file.py:name`"
            )
    if not message.isprintable():
        message = ascii(message)
    return f"is not a regular expression of RE2: {message}"[:200]


def to_utf8(text: str) -> bytes:
    """Returns a text as UTF-8. A lone surrogate, which UTF-8 cannot encode, becomes the replacement character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
