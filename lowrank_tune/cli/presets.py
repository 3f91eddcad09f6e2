"""`presets`: lists, prints and copies presets."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.cli.common import Debug, app, report_user_errors
from lowrank_tune.cli.new_file import write_new_file

presets = typer.Typer(
    invoke_without_command=True, help="List the presets, or print or copy one to start your own from."
)
app.add_typer(presets, name="presets")
# characters of the longest name
MAX_NAME_WIDTH = 23
PresetName = Annotated[str, typer.Argument(help="A preset's name, as `lowrank-tune presets` lists them.")]


@presets.callback()
def presets_command(context: typer.Context) -> None:
    """List the presets, or print or copy one to start your own from."""
    if context.invoked_subcommand is not None:
        return
    with report_user_errors(False):
        from lowrank_tune.config import list_presets

        for group, members in groupby(list_presets(), key=lambda preset: preset.group):
            print(group)
            for base, same_base in groupby(members, key=lambda preset: preset.base):
                print(f"  {base}")
                for preset in same_base:
                    peak = "" if preset.peak_gib is None else f"{preset.peak_gib:.1f} GiB"
                    print(f"    {preset.name:<{MAX_NAME_WIDTH}}  {peak:>8}  {preset.description}")
        print("`presets show NAME` prints one, `presets copy NAME FILE` makes it yours.")


@presets.command("show")
def show_preset(
    name: PresetName,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print every setting: with `extends` and defaults resolved.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print a preset as it is written; with --resolved the complete recipe with every setting."""
    with report_user_errors(debug):
        from lowrank_tune.config import dump, find_preset, load_any

        sys.stdout.write(dump(load_any(name)) if resolved else find_preset(name).read_text(encoding="utf-8"))


@presets.command("copy")
def copy_preset(
    name: PresetName,
    file: Annotated[Path | None, typer.Argument(help="Default: NAME.yaml in this folder.")] = None,
    debug: Debug = False,
) -> None:
    """Copy a preset to a file of your own, never over an existing one."""
    with report_user_errors(debug):
        from lowrank_tune.config import find_preset

        target = file or Path(f"{name}.yaml")
        write_new_file(target, find_preset(name).read_text(encoding="utf-8"), "name another file")
        print(f"{target}: change it, then `lowrank-tune data {target}` and `lowrank-tune run {target}`")
