"""The lines of a screen: styled pieces of text, cut and padded to terminal cells. Nothing here writes to a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from lowrank_tune.ui import escape_control_chars

Piece = tuple[str, str]
Line = list[Piece]
"""A line of a screen: pieces of text, each with the name of a style in `STYLES`."""
Block = list[Line]
"""Lines of a screen, one below the other."""


@dataclass(frozen=True)
class Style:
    """A style of text: its escape code with colors, its escape code without (NO_COLOR), and its name in rich, for
    pictures."""

    color: str = ""
    plain: str = ""
    rich: str = ""


STYLES = {
    "": Style(),
    "quiet": Style("2", "2", "dim"),
    "strong": Style("1", "1", "bold"),
    "title": Style("1;36", "1", "bold cyan"),
    "key": Style("7", "7", "reverse"),
    "good": Style("32", "", "green"),
    "warning": Style("1;33", "1", "bold yellow"),
    "bad": Style("1;31", "1", "bold red"),
    "first": Style("96", "1", "bright_cyan"),
    "second": Style("93", "", "bright_yellow"),
    "chosen": Style("92", "1", "bright_green"),
    "rejected": Style("91", "", "bright_red"),
    "third": Style("95", "1", "bright_magenta"),
    "fourth": Style("94", "", "bright_blue"),
    "bar": Style("36", "1", "cyan"),
}


def sanitize(
    text: str,
    ascii_only: bool = False,
    limit: int = 500,
) -> str:
    """Returns untrusted text without control characters, at most `limit` characters of it, for a terminal that may show
    ASCII only."""
    text = escape_control_chars(text, limit)
    if ascii_only:
        return text.encode("ascii", "backslashreplace").decode("ascii")
    return text


def width_of(line: Line) -> int:
    """Returns the cells that a line fills."""
    return sum(cell_len(text) for text, _ in line)


def fit(line: Line, width: int) -> Line:
    """Returns the line in exactly `width` cells: cut, or filled with blanks."""
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


def pad(
    lines: Sequence[Line],
    width: int,
    height: int,
) -> Block:
    """Returns the block in exactly `width` x `height` cells."""
    filled = [fit(line, width) for line in lines[:height]]
    missing = height - len(filled)
    return filled + [fit([], width) for _ in range(missing)]


def column_widths(width: int, columns: int) -> list[int]:
    """Returns equal widths, with one cell between the columns; the first ones are one cell wider if needed."""
    base, extra = divmod(width - columns + 1, columns)
    return [base + (index < extra) for index in range(columns)]


def side_by_side(
    blocks: Sequence[Sequence[Line]],
    widths: Sequence[int],
    height: int,
    gap: str = " ",
) -> Block:
    """Returns blocks next to each other, as `height` lines with `gap` between the blocks."""
    rows: Block = [[] for _ in range(height)]
    for index, (block, width) in enumerate(zip(blocks, widths, strict=True)):
        for row, line in zip(rows, pad(block, width, height), strict=True):
            if index > 0:
                row.append((gap, "quiet"))
            row += line
    return rows


def wrap(
    text: str,
    width: int,
    lines: int,
) -> list[str]:
    """Returns text broken at blanks into at most `lines` lines of `width` cells, with `...` at the end if text is left
    out."""
    if width < 4 or lines < 1:
        return []
    rows = []
    rest = text
    while rest:
        if _fits(rest, width):
            rows.append(rest)
            break
        if len(rows) == lines - 1:
            rows.append(shorten(rest, width))
            break
        cut = _break_index(rest, width)
        rows.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return rows


def fold(
    line: str,
    width: int,
    indent: int,
) -> str:
    """Returns a line broken so that each row is shorter than `width` if possible; rows after the first are indented.

    Words are not broken. If values are two blanks apart, a name and its value stay in the same row.
    """
    joined = line
    if re.search(r"\S {2,}\S.* {2,}\S", line):
        joined = re.sub(r"(?<=\S) (?=\S)", "\0", line)
    rows = textwrap.wrap(
        joined,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(rows).replace("\0", " ")


def shorten(text: str, width: int) -> str:
    """Returns the text in at most `width` cells, with `...` after the last word or path that fits."""
    if cell_len(text) <= width:
        return text
    if width < 4:
        return text[: max(0, width)]
    kept = text[: _break_index(text, width - 3)].rstrip()
    return f"{kept}..."


def _fits(text: str, width: int) -> bool:
    """Returns whether a text fills at most `width` cells. Of most long texts only the beginning is measured."""
    if text.isascii():
        return len(text) <= width
    return cell_len(text[: 4 * width]) <= width and cell_len(text) <= width


def _break_index(text: str, width: int) -> int:
    """Returns the index of the last blank that fits, else the one after the last slash, else that of the last character
    that fits. Blanks and slashes in the first half do not count."""
    fitting = _count_fitting(text, width)
    blank = text.rfind(" ", 0, fitting + 1)
    if blank > width // 2:
        return blank
    slash = text.rfind("/", 0, fitting) + 1
    return slash if slash > width // 2 else fitting


def _count_fitting(text: str, width: int) -> int:
    """Returns how many characters fill at most `width` cells; at least one, so that wrapping always ends."""
    if text[: width + 1].isascii():
        # each character is one cell, and the next one does not combine with the last that fits
        return max(1, min(width, len(text)))
    used = 0
    for index, character in enumerate(text):
        used += cell_len(character)
        if used > width:
            return max(1, index)
    return len(text)


def plain_text(lines: Sequence[Line]) -> str:
    """Returns the screen without styles and without trailing blanks."""
    rows = []
    for line in lines:
        text = "".join(text for text, _ in line)
        rows.append(text.rstrip())
    return "\n".join(rows) + "\n"


def with_code(text: str, code: str) -> str:
    """Returns the text between an escape code and its reset; unchanged if the code or the text is empty."""
    if not code or not text:
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def to_ansi(line: Line, color: bool) -> str:
    """Returns the line with escape codes."""
    parts = []
    for text, name in line:
        style = STYLES[name]
        parts.append(with_code(text, style.color if color else style.plain))
    return "".join(parts)


def rich_text(lines: Sequence[Line]) -> Text:
    """Returns the screen for the exporters of rich."""
    screen = Text(no_wrap=True, end="")
    for index, line in enumerate(lines):
        if index > 0:
            screen.append("\n")
        for text, name in line:
            screen.append(text, STYLES[name].rich)
    return screen
