"""Where a completion of prose keeps what a verifier reads: in its last closed fence of three backticks."""

from __future__ import annotations

from collections.abc import Container


def last_fenced(text: str, languages: Container[str]) -> str | None:
    """The inside of the last closed fence that is marked as one of `languages` (the empty word: not marked). None
    without one."""
    lines = text.split("\n")
    opening: tuple[int, str] | None = None
    found: tuple[int, int] | None = None
    for number, line in enumerate(lines):
        mark = line.strip()
        if opening is None and mark.startswith("```"):
            opening = number, mark[3:].strip().casefold()
        elif opening is not None and mark == "```":
            found = (opening[0] + 1, number) if opening[1] in languages else found
            opening = None
    return None if found is None else "\n".join(lines[found[0] : found[1]])
