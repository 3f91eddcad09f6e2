"""Texts that grow beside each other, in the normal flow of a terminal's lines.

Final lines are written once and scroll away like any other output; only the lines below them are drawn again. So all
texts, however long, stay in the history of the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank_tune.ui.terminal.text_layout import Line, side_by_side, to_ansi, wrap

FRAME_SECONDS = 0.05
MIN_WIDTH = 20
UNLIMITED = 1 << 30
"""Lines of a paragraph."""


class Column:
    """A growing text as lines of `width` cells. All lines but the last are final, and that one as well once `over`."""

    def __init__(self) -> None:
        self.over = False
        self._width = 0
        self._lines = list[str]()
        self._paragraph = ""
        self._text = ""

    def add(self, text: str) -> None:
        """Appends text."""
        self._text += text
        *finished, rest = text.split("\n")
        for part in finished:
            self._lines += self._wrap(self._paragraph + part)
            self._paragraph = ""
        self._paragraph += rest

    def resize(self, width: int) -> None:
        """Wraps the text again if the width changed."""
        if width == self._width:
            return
        text = self._text
        self._width = width
        self._lines = []
        self._paragraph = ""
        self._text = ""
        self.add(text)

    def lines(self) -> list[str]:
        """Returns the lines so far; the last one may be empty."""
        return self._lines + self._wrap(self._paragraph)

    def _wrap(self, paragraph: str) -> list[str]:
        return wrap(paragraph, self._width, UNLIMITED) or [""]


@dataclass
class Columns:
    """Two or more texts side by side below their titles.

    `write` writes to the terminal, `size` returns its columns and lines.
    """

    write: Callable[[str], None]
    size: Callable[[], tuple[int, int]]
    titles: Sequence[Line]
    color: bool
    bar: str
    _screen_width: int = 0
    # lines that are final, and lines below them that the next frame draws again
    _final: int = 0
    _drawn: int = 0
    _last_frame: float = 0.0

    def __post_init__(self) -> None:
        self.gap = f" {self.bar} "
        self.columns = [Column() for _ in self.titles]

    def add(self, index: int, text: str) -> None:
        """Appends text to a column, and draws if the last frame is older than `FRAME_SECONDS`."""
        self.columns[index].add(text)
        if text and time.monotonic() - self._last_frame >= FRAME_SECONDS:
            self.draw()

    def end(self, index: int) -> None:
        """Marks the text of a column as complete."""
        self.columns[index].over = True
        self.draw()

    def draw(self) -> None:
        """Writes the lines that became final, and below them those that may still change, as many as the terminal has
        lines."""
        screen_width, screen_height = self.size()
        width = max(MIN_WIDTH, (screen_width - 1 - len(self.gap)) // 2)
        output = ""
        if screen_width != self._screen_width:
            output = self._restart(screen_width, width)
        if self._drawn:
            output += f"\x1b[{self._drawn}A"
        output += "\r"
        texts = [column.lines() for column in self.columns]
        final = max(self._final, self._count_final(texts))
        shown = min(_longest(texts), final + max(1, screen_height - 2))
        for number in range(self._final, shown):
            row = self._row([_line_of(lines, number) for lines in texts], width)
            output += f"{row}\x1b[K\n"
        self._final = final
        self._drawn = shown - final
        self._last_frame = time.monotonic()
        self.write(output)

    def _restart(self, screen_width: int, width: int) -> str:
        """Wraps all texts again, because the terminal has broken the old lines; returns a new row of titles."""
        for column in self.columns:
            column.resize(width)
        self._screen_width = screen_width
        self._final = 0
        self._drawn = 0
        return f"{self._row(self.titles, width)}\n"

    def _count_final(self, texts: Sequence[Sequence[str]]) -> int:
        """Returns the number of rows that cannot change any more."""
        final = _longest(texts)
        for lines, column in zip(texts, self.columns, strict=True):
            if not column.over:
                final = min(final, len(lines) - 1)
        return final

    def _row(self, cells: Sequence[Line], width: int) -> str:
        blocks = [[cell] for cell in cells]
        row = side_by_side(blocks, [width] * len(cells), 1, self.gap)[0]
        # a terminal that becomes narrower would break trailing blanks as well
        return to_ansi(row, self.color).rstrip()


def _longest(texts: Sequence[Sequence[str]]) -> int:
    return max(len(lines) for lines in texts)


def _line_of(lines: Sequence[str], number: int) -> Line:
    if number < len(lines):
        return [(lines[number], "")]
    return []
