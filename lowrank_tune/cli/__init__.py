"""The command line. Torch is imported only by the commands that need it, so that help and a faulty recipe take a
second."""

from __future__ import annotations

from typing import Annotated

import typer

from lowrank_tune import __version__
from lowrank_tune.cli import chat, checks, eval, examples, export, merge, monitor, plan, presets, run, score
from lowrank_tune.cli.common import app

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

COMMAND_ORDER = "demo run plan data score watch report compare chat eval merge export doctor schema".split()
"""The commands in the order of `--help`."""
app.registered_commands.sort(key=lambda command: COMMAND_ORDER.index(command.name or ""))


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    app()
