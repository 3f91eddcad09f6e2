"""The code fences (lines of three backticks) of a completion. Runs in the main process and in workers."""

from __future__ import annotations

from collections.abc import Container

FENCE = "```"


def last_code_block(text: str, languages: Container[str]) -> str | None:
    """Returns the content of the last closed fence that is marked as one of `languages` (the empty string: not
    marked); None if there is none."""
    lines = text.split("\n")
    opening = -1
    language = ""
    block = None
    for number, line in enumerate(lines):
        stripped = line.strip()
        if opening < 0 and stripped.startswith(FENCE):
            opening = number
            language = stripped[len(FENCE) :].strip().casefold()
        elif opening >= 0 and stripped == FENCE:
            if language in languages:
                block = (opening + 1, number)
            opening = -1
    if block is None:
        return None
    start, stop = block
    return "\n".join(lines[start:stop])


def last_code_block_or_text(text: str, languages: Container[str]) -> str:
    """Returns `last_code_block`, or the whole text if there is none."""
    block = last_code_block(text, languages)
    return text if block is None else block


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Returns (language, content) of all fences; the last one may be open. The language is the first word after the
    opening backticks, in lower case. Unlike `last_code_block`, any line that begins with backticks closes a fence."""
    blocks = []
    opening = -1
    language = ""
    lines = text.split("\n")
    for number, line in enumerate([*lines, FENCE]):
        stripped = line.strip(" \t\r")
        if not stripped.startswith(FENCE):
            continue
        if opening < 0:
            opening = number
            words = stripped[len(FENCE) :].split(maxsplit=1)
            language = words[0].lower() if words else ""
        else:
            content = "".join(f"{line}\n" for line in lines[opening + 1 : number])
            blocks.append((language, content))
            opening = -1
    return blocks
