"""A horizontal bar to scale, in the width that a table leaves for it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

BAR_WIDTH = 24
MIN_WIDTH = 4
EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Bar:
    """A bar that fills `share` of `width` cells, or of all cells if there are fewer. `plain`: ASCII alone."""

    share: float
    style: str
    plain: bool = False
    width: int = BAR_WIDTH

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Returns the widths of the whole bar, and not of its filled part, so that all bars of a column have the same
        scale."""
        return Measurement(min(MIN_WIDTH, self.width), self.width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self.width, options.max_width)
        yield Text(filled_cells(self.share, width, self.plain), self.style, no_wrap=True)


def filled_cells(
    share: float,
    width: int,
    plain: bool = False,
) -> str:
    """Returns the filled part of a bar: `share` of `width` cells in eighths, or in whole cells if `plain`. A share
    above 0 fills at least the smallest part."""
    cells = max(0.0, min(1.0, share)) * width
    smallest = int(share > 0)
    if plain:
        return "#" * max(round(cells), smallest)
    whole, rest = divmod(max(round(cells * 8), smallest), 8)
    return "█" * whole + EIGHTHS[rest].strip()
