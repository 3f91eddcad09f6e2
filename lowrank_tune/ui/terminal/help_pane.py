"""The help pane: the keys, and how to read the screen."""

from __future__ import annotations

from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import KEYS, View, heading, keys_of
from lowrank_tune.ui.terminal.text_layout import Block, Line, column_widths, side_by_side, wrap

NOTES = (
    "Dots are measured values, the bright line is their moving average, the second color is validation.",
    "KL is measured in nats a token against the reference named above.",
    "In the group, the log and the answers: the arrows, PgUp, PgDn, Home and End scroll, Esc leaves.",
    "Ctrl-C once: finish the step, save, quit. Twice: quit at once. Ctrl-Z: to the shell; fg brings the screen back.",
    "From another terminal: lowrank-tune watch RUN",
)


def help_pane(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns a line for each key, then the notes. Without room for both, the keys are in two columns."""
    keys: Block = [_key_line(key, view) for key in keys_of(state, view)]
    notes: Block = []
    for note in NOTES:
        notes += [[(f"  {row}", "quiet")] for row in wrap(note, width - 4, 3)]
    if len(keys) + len(notes) + 2 > height:
        half = -(-len(keys) // 2)
        keys = side_by_side([keys[:half], keys[half:]], column_widths(width, 2), half)
    return [heading("help", width, view), *keys, [], *notes][:height]


def _key_line(key: str, view: View) -> Line:
    _, effect = KEYS[key]
    if key == "q" and not view.owns_run:
        effect = "close this screen; the run goes on"
    return [
        ("  ", ""),
        (f" {key} ", "key"),
        (f"  {effect}", ""),
    ]
