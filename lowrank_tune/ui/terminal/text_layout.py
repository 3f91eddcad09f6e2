"""What a screen is made of: lines of styled pieces of text, cut and padded to terminal cells. No terminal is touched
here."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from lowrank_tune.ui import escape_control_chars

Piece = tuple[str, str]
Line = list[Piece]
"""A line of a screen: pieces of text, each with the name of a style in `STYLES`."""

STYLES: dict[str, tuple[str, str, str]] = {
    "": ("", "", ""),
    "quiet": ("2", "2", "dim"),
    "strong": ("1", "1", "bold"),
    "title": ("1;36", "1", "bold cyan"),
    "key": ("7", "7", "reverse"),
    "good": ("32", "", "green"),
    "warning": ("1;33", "1", "bold yellow"),
    "bad": ("1;31", "1", "bold red"),
    "first": ("96", "1", "bright_cyan"),
    "second": ("93", "", "bright_yellow"),
    "chosen": ("92", "1", "bright_green"),
    "rejected": ("91", "", "bright_red"),
    "third": ("95", "1", "bright_magenta"),
    "fourth": ("94", "", "bright_blue"),
    "bar": ("36", "1", "cyan"),
}
"""Each style as an escape code with colors, as one without (NO_COLOR), and as rich names it for pictures."""


def sanitize(text: str, ascii_only: bool = False, limit: int = 500) -> str:
    """Foreign text, fit for a screen: inert, and in ASCII where the terminal knows no more."""
    text = escape_control_chars(text, limit)
    if ascii_only:
        return text.encode("ascii", "backslashreplace").decode("ascii")
    return text


def width_of(line: Line) -> int:
    return sum(cell_len(text) for text, _ in line)


def fit(line: Line, width: int) -> Line:
    """The line in exactly `width` cells: cut, or filled with blanks."""
    fitted = []
    left = max(0, width)
    for text, style in line:
        size = cell_len(text)
        if size > left:
            text = set_cell_size(text, left)
            size = left
        if text:
            fitted.append((text, style))
        left -= size
        if left == 0:
            return fitted
    return [*fitted, (" " * left, "")]


def pad(lines: Sequence[Line], width: int, height: int) -> list[Line]:
    """The block in exactly `width` x `height` cells."""
    filled = [fit(line, width) for line in lines[:height]]
    return filled + [[(" " * width, "")] for _ in range(height - len(filled))]


def side_by_side(blocks: Sequence[Sequence[Line]], widths: Sequence[int], height: int, gap: str = " ") -> list[Line]:
    """Blocks next to each other."""
    padded = [pad(block, width, height) for block, width in zip(blocks, widths, strict=True)]
    rows: list[Line] = []
    for row in zip(*padded, strict=True):
        line: Line = []
        for index, part in enumerate(row):
            line += [(gap, "quiet"), *part] if index else part
        rows.append(line)
    return rows


def wrap(text: str, width: int, lines: int) -> list[str]:
    """Text broken at blanks into at most `lines` lines of `width` cells; dots tell that some is missing."""
    if width < 4 or lines < 1:
        return []
    rows = []
    rest = text
    while rest:
        if cell_len(rest) <= width:
            rows.append(rest)
            break
        cut = _cut(rest, width)
        if len(rows) == lines - 1:
            rows.append(rest[: _cut_hard(rest, width - 3)] + "...")
            break
        rows.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return rows


def fold(line: str, width: int, indent: int) -> str:
    """A line broken before it reaches `width`; never within a word, nor between a name and its value where values are
    two blanks apart. What follows is indented."""
    if re.search(r"\S {2,}\S.* {2,}\S", line):
        joined = re.sub(r"(?<=\S) (?=\S)", "\0", line)
    else:
        joined = line
    rows = textwrap.wrap(joined, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(rows).replace("\0", " ")


def _cut(text: str, width: int) -> int:
    hard = _cut_hard(text, width)
    blank = text.rfind(" ", 0, hard + 1)
    return blank if blank > width // 2 else hard


def _cut_hard(text: str, width: int) -> int:
    """How many characters fill at most `width` cells; at least one, so that wrapping always ends."""
    used = 0
    for index, character in enumerate(text):
        used += cell_len(character)
        if used > width:
            return max(1, index)
    return len(text)


def plain_text(lines: Sequence[Line]) -> str:
    """The screen without its styles, trailing blanks removed."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines) + "\n"


def to_ansi(line: Line, color: bool) -> str:
    """The line with escape codes."""
    parts = []
    for text, style in line:
        code = STYLES[style][0 if color else 1]
        parts.append(f"\x1b[{code}m{text}\x1b[0m" if code else text)
    return "".join(parts)


def rich_text(lines: Sequence[Line]) -> Text:
    """The screen for rich's exporters."""
    whole = Text(no_wrap=True, end="")
    for index, line in enumerate(lines):
        for text, style in line:
            whole.append(text, STYLES[style][2])
        if index < len(lines) - 1:
            whole.append("\n")
    return whole
