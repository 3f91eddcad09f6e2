"""The command line. Torch is imported only by the commands that need it, so that help and a faulty recipe take a
second."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lowrank_tune import __version__
from lowrank_tune.cli import chat, checks, eval, export, merge, monitor, plan, presets, run, score
from lowrank_tune.cli.common import HelpCommand, HelpGroup, app

__all__ = ["app", "chat", "checks", "eval", "export", "main", "merge", "monitor", "plan", "presets", "run", "score"]

PANELS = {
    "Start": "demo doctor schema presets",
    "Train": "data plan run score",
    "Look at runs": "watch report compare",
    "Use what was trained": "chat eval merge export",
}
"""The commands by panel of `--help`, in their order there."""
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
CLOSED_PIPE = 128 + 13
"""Exit code of a program that SIGPIPE ends, as a shell prints it."""

app.registered_commands.sort(key=lambda command: [*PANEL_OF].index(command.name or ""))
for group in app.registered_groups:
    group.cls, group.rich_help_panel = HelpGroup, PANEL_OF.get(group.name or "")
for typer_app in (app, *(group.typer_instance for group in app.registered_groups)):
    for command in typer_app.registered_commands if typer_app is not None else ():
        command.cls = HelpCommand
        # in a list of commands rich keeps the line breaks of a docstring
        command.help = " ".join((command.callback and command.callback.__doc__ or "").split())
for command in app.registered_commands:
    command.rich_help_panel = PANEL_OF[command.name or ""]


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Runs the command line. Where the reader of a pipe has gone (`presets | head -1`), it ends without a message."""
    try:
        app()
    except SystemExit as end:
        closed = isinstance(end.__context__, BrokenPipeError)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            closed = closed or not end.code
        if not closed:
            raise
        # else Python finds the closed pipe once more at its exit, and prints a message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_PIPE)
