"""The command line, one module for each command.

Torch is imported only by the commands that need it, so that help and a faulty recipe take one second.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from lowrank_tune import __version__
from lowrank_tune.cli import (
    chat,
    compare,
    data,
    doctor,
    eval,
    examples,
    export,
    merge,
    plan,
    presets,
    report,
    run,
    runs,
    schema,
    score,
    watch,
)
from lowrank_tune.cli.common import app
from lowrank_tune.cli.help_pages import arrange_commands
from lowrank_tune.cli.warning_format import format_warning

__all__ = [
    "app",
    "chat",
    "compare",
    "data",
    "doctor",
    "eval",
    "examples",
    "export",
    "main",
    "merge",
    "plan",
    "presets",
    "report",
    "run",
    "runs",
    "schema",
    "score",
    "watch",
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
    """Runs the command line. If the reader of a pipe has closed it (`presets | head -1`), there is no error message.

    A command that has failed keeps its exit code.
    """
    warnings.formatwarning = format_warning
    try:
        app()
    except SystemExit as end:
        code = CLOSED_PIPE if isinstance(end.__context__, BrokenPipeError) else end.code
        # stdout was closed from the start
        if sys.stdout is None:
            sys.exit(code)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes stdout at its exit, meets the closed pipe again, and prints a message
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = code or CLOSED_PIPE
        sys.exit(code)
