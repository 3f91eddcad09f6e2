"""Presets, and the schema of a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lowrank_tune.cli.common import Debug, app, sentences
from lowrank_tune.errors import UserError

presets = typer.Typer(invoke_without_command=True, help="List the presets, or print or copy one to start your own from.")
app.add_typer(presets, name="presets")
Preset = Annotated[str, typer.Argument(help="A preset's name, as `lowrank-tune presets` lists them.")]


@presets.callback()
def list_presets(context: typer.Context) -> None:
    """List the presets, or print or copy one to start your own from."""
    if context.invoked_subcommand is not None:
        return
    with sentences(False):
        from lowrank_tune.recipe import presets as all_presets

        table = Table("preset", "algorithm", "what it is", box=None)
        for preset, description, algorithm in all_presets():
            table.add_row(preset, algorithm, description)
        Console().print(table)


@presets.command("show")
def show_preset(name: Preset, debug: Debug = False) -> None:
    """Print a preset."""
    with sentences(debug):
        from lowrank_tune.recipe import find_preset

        sys.stdout.write(find_preset(name).read_text(encoding="utf-8"))


@presets.command("copy")
def copy_preset(name: Preset, file: Annotated[Path | None, typer.Argument(help="NAME.yaml here, where it is not given.")] = None,
                debug: Debug = False) -> None:  # fmt: skip
    """Copy a preset to a file of your own; never over one that is there."""
    with sentences(debug):
        from lowrank_tune.recipe import find_preset

        text, target = find_preset(name).read_text(encoding="utf-8"), file or Path(f"{name}.yaml")
        try:
            with target.open("x", encoding="utf-8") as opened:
                opened.write(text)
        except OSError as error:
            told = "is there already; name another file" if target.exists() else f"cannot be written: {error.strerror or error}"
            raise UserError(f"{target}: {told}") from error
        print(f"{target}: change it, then `lowrank-tune data {target}` and `lowrank-tune run {target}`")


@app.command("schema")
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of a recipe, for editors."""
    with sentences(debug):
        from lowrank_tune.recipe import schema as recipe_schema

        print(json.dumps(recipe_schema(), indent=2))
