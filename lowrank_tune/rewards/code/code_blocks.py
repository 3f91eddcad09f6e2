"""Where a completion of prose keeps what a verifier reads: in its last closed fence of three backticks."""

from __future__ import annotations

from collections.abc import Container


def last_code_block(text: str, languages: Container[str]) -> str | None:
    """The inside of the last closed fence that is marked as one of `languages` (the empty word: not marked). None
    without one."""
    lines = text.split("\n")
    opening: tuple[int, str] | None = None
    span: tuple[int, int] | None = None
    for number, line in enumerate(lines):
        stripped = line.strip()
        if opening is None and stripped.startswith("```"):
            opening = number, stripped[3:].strip().casefold()
        elif opening is not None and stripped == "```":
            span = (opening[0] + 1, number) if opening[1] in languages else span
            opening = None
    if span is None:
        return None
    return "\n".join(lines[span[0] : span[1]])
