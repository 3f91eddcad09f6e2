"""The common parts of all panes of the dashboard: display settings, keys, title lines and labeled text.

Each pane is a pure function of the state, the view and its size in cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from lowrank_tune.config.schema import ONLINE_ALGORITHMS
from lowrank_tune.ui import mark_line_breaks
from lowrank_tune.ui.state import State
from lowrank_tune.ui.system_stats import Reading
from lowrank_tune.ui.terminal.text_layout import Block, Line, Piece, sanitize, wrap

SMOOTHINGS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Weights of the moving average, selected by `+` and `-`."""
KEYS = {
    "q": ("quit", "save and quit"),
    "p": ("pause", "pause or continue"),
    "s": ("save", "save now"),
    "e": ("eval", "evaluate now"),
    "n": ("next", "next question"),
    "g": ("group", "the newest group of completions"),
    "l": ("log", "the whole log"),
    "a": ("answers", "all answers"),
    "[": ("", "the stage before this one"),
    "]": ("stage", "the next stage"),
    "o": ("layout", "shared charts, or side by side"),
    "0-9": ("runs", "1 to 9 show one run, 0 all"),
    "y": ("log scale", "logarithmic y axes"),
    "+": ("", "smoother curves"),
    "-": ("smooth", "less smooth"),
    "?": ("help", "this help"),
}
"""The label of each key in the footer, and its effect on the help pane."""
CONTROL_KEYS = "pse"
"""Keys that only the screen of the run itself has, not that of `watch`. There, `q` closes the screen alone."""
OVERVIEW_KEYS = ("q", "o", "0-9", "y", "+", "-", "?")
"""Keys that have an effect where several runs share their charts."""
OPTIONAL_KEYS = "+-ynoes"
"""Keys that a footer without room leaves out, in this order. The help pane has all of them."""


@dataclass(frozen=True)
class View:
    """Display settings of a screen, and values of this moment: pending requests, the Unix time and the load."""

    log_scale: bool = False
    smoothing: int = 2
    """Index of the weight in `SMOOTHINGS`."""
    sample: int = 0
    """Index of the first question, pair or page that is shown, modulo their number."""
    help: bool = False
    pane: str = ""
    """Key of the pane that is open instead of the charts, one of `render.PANES`."""
    scroll: int = 0
    """Lines of the open pane below the last one that is shown; 0 follows new lines."""
    frozen: float | None = None
    """Unix time at which the scrolling began. Later lines are not shown, so that the others stay in their place."""
    page_lines: int = 20
    """Lines that a page key scrolls."""
    stage: int = 0
    """Stage of a chain that is shown, 0 for the current one, negative for so many before it."""
    run: int = 0
    """The only one of several runs that is shown, 0 for all of them."""
    runs: int = 1
    """How many runs this screen shows."""
    is_overview: bool = False
    """Whether several runs share their charts on this screen."""
    other_layout: bool = False
    """Whether several runs are not shown in the way that fits the width of the screen best."""
    ascii_only: bool = False
    owns_run: bool = True
    """Whether this process runs the training; `watch` does not."""
    keys: bool = True
    """Whether there is a keyboard."""
    pending: tuple[str, ...] = ()
    now: float | None = None
    system: tuple[Reading, ...] = ()
    """Load of the GPU or of the process, the newest last; empty if it is not known."""

    def sanitize(self, text: str, limit: int = 500) -> str:
        """Returns untrusted text for this screen in one line, at most `limit` characters of it."""
        return sanitize(mark_line_breaks(text[: 8 * limit], self.ascii_only), self.ascii_only, limit)

    def symbol(self, preferred: str, ascii_symbol: str) -> str:
        """Returns the symbol that this screen can show."""
        return ascii_symbol if self.ascii_only else preferred


def keys_of(state: State, view: View) -> list[str]:
    """Returns the keys that have an effect on this screen."""
    if view.is_overview:
        return list(OVERVIEW_KEYS)
    without = list[str]()
    if not view.owns_run:
        without += CONTROL_KEYS
    if state.group is None and state.algorithm not in ONLINE_ALGORITHMS:
        without.append("g")
    if not state.finished_stages:
        without += ("[", "]")
    if view.runs == 1:
        without += ("o", "0-9")
    elif view.run:
        without.append("o")
    return [key for key in KEYS if key not in without]


def heading(
    text: str,
    width: int,
    view: View,
    right: str = "",
) -> Line:
    """Returns the title of a pane, with a rule to its end and a note at the right."""
    rule = view.symbol("\u2500", "-")
    note = f" {right}" if right else ""
    rest = width - cell_len(text) - cell_len(note) - 5
    return [
        (f"{rule * 2} ", "quiet"),
        (text, "title"),
        (f" {rule * rest}{note} ", "quiet"),
    ]


def labeled_value(
    label: str,
    value: str,
    style: str = "",
) -> Line:
    """Returns a dim label and a value."""
    return [(label, "quiet"), (value, style)]


def prompt_lines(
    prompt: str,
    view: View,
    width: int,
    max_lines: int,
) -> Block:
    """Returns a prompt in bold, wrapped to at most `max_lines` lines."""
    text = view.sanitize(prompt, 4 * width)
    return [[(f" {row}", "strong")] for row in wrap(text, width - 2, max_lines)]


def labeled(
    label: Piece,
    rows: Sequence[str],
    style: str = "",
) -> Block:
    """Returns a line for each row. The first begins with the label, the others are indented by its length."""
    text, label_style = label
    lines: Block = []
    for row in rows:
        lines.append([(text, label_style), (row, style)])
        text = " " * len(text)
    return lines
