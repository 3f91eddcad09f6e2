"""`lowrank-tune compare`: several runs and chains side by side, in the terminal and as one page, from their folders."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from lowrank_tune.checkpoint import write_file
from lowrank_tune.ui import encodable
from lowrank_tune.ui.compare.page import compare_page
from lowrank_tune.ui.compare.page_file import page_file
from lowrank_tune.ui.compare.runs import ComparedRun, read_runs
from lowrank_tune.ui.compare.screen import TextCanvas, screen
from lowrank_tune.ui.terminal.device import ascii_only
from lowrank_tune.ui.terminal.text_layout import plain_text, to_ansi

__all__ = [
    "TextCanvas",
    "ComparedRun",
    "compare",
    "compare_page",
    "read_runs",
    "screen",
]

PIPED_WIDTH = 120
MIN_WIDTH = 40


def compare(
    runs: Sequence[Path],
    html_path: Path | None = None,
    output: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Path:
    """Writes the comparison to `output` and the page to `html_path`, by default `compare-A-B.html` beside the first run
    A; returns the path of the page.

    Raises UserError if a path is not a run, or if the page cannot be written.
    """
    compared = read_runs(runs)
    out = sys.stdout if output is None else output
    on_terminal = out.isatty() and environ.get("TERM", "dumb") != "dumb"
    color = on_terminal and not environ.get("NO_COLOR")
    width = PIPED_WIDTH
    if on_terminal or "COLUMNS" in environ:
        width = shutil.get_terminal_size((PIPED_WIDTH, 24)).columns
    canvas = TextCanvas(
        max(MIN_WIDTH, width),
        signs=not color,
        ascii_only=ascii_only(out, environ),
    )
    lines = screen(compared, canvas)
    if on_terminal:
        text = "\n".join(to_ansi(line, color) for line in lines) + "\n"
    else:
        text = plain_text(lines)
    out.write(encodable(text, out))
    out.flush()
    target = html_path or page_file(compared)
    write_file(target, compare_page(compared).encode("utf-8", "backslashreplace"))
    return target
