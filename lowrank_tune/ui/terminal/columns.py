"""Texts that grow beside each other, in the flow of a terminal's lines.

Lines that can no longer change are written once and scroll away like any other output; only those below them are drawn
again. So what was said stays in the terminal's history, and nothing is lost however long it becomes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lowrank_tune.ui.terminal.text_layout import Line, side_by_side, to_ansi, wrap

FRAME_SECONDS = 0.05
MIN_WIDTH = 20
UNLIMITED = 1 << 30  # lines that a paragraph may have


class Column:
    """A text that grows, as lines of `width` cells. All but the last one are final, until `over`."""

    def __init__(self) -> None:
        self.over = False
        self._width = 0
        self._lines = list[str]()
        self._paragraph = ""
        self._text = ""

    def add(self, text: str) -> None:
        self._text += text
        *whole, rest = text.split("\n")
        for part in whole:
            self._lines += wrap(self._paragraph + part, self._width, UNLIMITED) or [""]
            self._paragraph = ""
        self._paragraph += rest

    def resize(self, width: int) -> None:
        if width != self._width:
            text = self._text
            self._width = width
            self._lines = []
            self._paragraph = ""
            self._text = ""
            self.add(text)

    def lines(self) -> list[str]:
        return [*self._lines, *(wrap(self._paragraph, self._width, UNLIMITED) or [""])]


class Columns:
    """Titles, and below them the texts. `write` goes to a terminal, `size` is its columns and lines."""

    def __init__(
        self,
        write: Callable[[str], None],
        size: Callable[[], tuple[int, int]],
        titles: Sequence[Line],
        color: bool,
        bar: str,
    ) -> None:
        self.write = write
        self.size = size
        self.titles = titles
        self.color = color
        self.gap = f" {bar} "
        self.columns = [Column() for _ in titles]
        self._screen = 0
        self._settled = 0
        self._drawn = 0
        self._last = 0.0

    def add(self, index: int, text: str) -> None:
        """More of a text. Drawn a few times a second."""
        self.columns[index].add(text)
        if text and time.monotonic() - self._last >= FRAME_SECONDS:
            self.draw()

    def end(self, index: int) -> None:
        """A text is whole."""
        self.columns[index].over = True
        self.draw()

    def draw(self) -> None:
        """Writes what became final, and below it again what may still change, as much as the terminal can hold."""
        across, down = self.size()
        width = max(MIN_WIDTH, (across - 1 - len(self.gap)) // 2)
        out = []
        if across != self._screen:  # the terminal has broken the old lines anew: begin below them
            for column in self.columns:
                column.resize(width)
            self._screen = across
            self._settled = 0
            self._drawn = 0
            out += [f"{self._row([[title] for title in self.titles], width)}\n"]
        texts = [column.lines() for column in self.columns]
        longest = max(map(len, texts))
        final = min(
            (len(lines) - 1 for lines, column in zip(texts, self.columns, strict=True) if not column.over),
            default=longest,
        )
        final = max(final, self._settled)
        shown = min(longest, final + max(1, down - 2))
        out.append(f"\x1b[{self._drawn}A\r" if self._drawn else "\r")
        for number in range(self._settled, shown):
            cells: list[list[Line]] = [[[(lines[number], "")]] if number < len(lines) else [[]] for lines in texts]
            out.append(f"{self._row(cells, width)}\x1b[K\n")
        self._settled = final
        self._drawn = shown - final
        self._last = time.monotonic()
        self.write("".join(out))

    def _row(self, cells: Sequence[Sequence[Line]], width: int) -> str:
        # a narrower terminal breaks blanks too
        return to_ansi(side_by_side(cells, [width] * len(cells), 1, self.gap)[0], self.color).rstrip()
