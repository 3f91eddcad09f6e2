"""The help pane: the keys, and how to read the screen."""

from __future__ import annotations

from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import KEYS, View, heading, keys_of
from lowrank_tune.ui.terminal.text_layout import Block, wrap

NOTES = (
    "Dots are measured values, the bright line is their moving average, the second color is validation.",
    "KL is measured in nats a token against the reference named above.",
    "Ctrl-C once: finish the step, save, quit. Twice: quit at once. Ctrl-Z: to the shell; fg brings the screen back.",
    "From another terminal: lowrank-tune watch RUN",
)


def help_pane(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns a line for each key, then the notes."""
    lines = [heading("help", width, view)]
    for key in keys_of(state, view):
        _, effect = KEYS[key]
        if key == "q" and not view.owns_run:
            effect = "close this screen; the run continues"
        lines.append(
            [
                ("  ", ""),
                (f" {key} ", "key"),
                (f"  {effect}", ""),
            ]
        )
    lines.append([])
    for note in NOTES:
        for row in wrap(note, width - 4, 3):
            lines.append([(f"  {row}", "quiet")])
    return lines[:height]
