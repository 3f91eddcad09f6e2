"""The command line. Torch is imported only by the commands that need it, so that help and a faulty recipe take a
second."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lowrank_tune import __version__
from lowrank_tune.cli import chat, checks, eval, examples, export, merge, monitor, plan, presets, run, score
from lowrank_tune.cli.common import app
from lowrank_tune.cli.help_pages import arrange_commands

__all__ = [
    "app",
    "chat",
    "checks",
    "eval",
    "examples",
    "export",
    "main",
    "merge",
    "monitor",
    "plan",
    "presets",
    "run",
    "score",
]

CLOSED_PIPE = 128 + 13
"""Exit code of a program that SIGPIPE ends, as a shell prints it."""

arrange_commands(app)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. If the reader of a pipe has closed it (`presets | head -1`), end without a message.

    A command that has failed keeps its exit code.
    """
    try:
        app()
    except SystemExit as end:
        code = CLOSED_PIPE if isinstance(end.__context__, BrokenPipeError) else end.code
        if sys.stdout is None:  # closed from the start
            sys.exit(code)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes stdout at its exit, meets the closed pipe again, and prints a message
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = code or CLOSED_PIPE
        sys.exit(code)
