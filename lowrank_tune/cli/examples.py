"""`examples`: lists and copies the example scripts."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.cli.common import Debug, app, report_user_errors
from lowrank_tune.cli.new_file import write_new_file
from lowrank_tune.errors import UserError, did_you_mean

ALL = "all"
COMMAND = re.compile(r": `python [^`]*`")
SENTENCE_END = re.compile(r"(?<=\.)\s")

examples = typer.Typer(
    invoke_without_command=True,
    help="List the example scripts, or copy them.",
)
app.add_typer(examples, name="examples")


def find_examples() -> dict[str, Path]:
    """Returns the scripts by name. In an installed package they are inside it, in a clone beside it."""
    package = Path(__file__).resolve().parent.parent
    folders = (package / "examples", package.parent / "examples")
    for folder in folders:
        if folder.is_dir():
            return {script.stem: script for script in sorted(folder.glob("*.py"))}
    return {}


def summarize_script(text: str) -> str:
    """Returns the first sentence of a script's docstring on one line, without the command that runs the script."""
    docstring = ast.get_docstring(ast.parse(text)) or ""
    sentence = SENTENCE_END.split(docstring)[0].replace("\n", " ")
    return COMMAND.sub("", sentence).removesuffix(".")


@examples.callback()
def examples_command(context: typer.Context) -> None:
    """List the example scripts, or copy them."""
    if context.invoked_subcommand is not None:
        return
    with report_user_errors(False):
        scripts = find_examples()
        width = max(map(len, scripts), default=0)
        for name, script in scripts.items():
            print(f"{name:<{width}}  {summarize_script(script.read_text(encoding='utf-8'))}")
        print("`examples copy` copies all to examples/, `examples copy NAME FOLDER` copies one.")


@examples.command("copy")
def copy_examples(
    name: Annotated[
        str, typer.Argument(metavar="NAME|all", help="An example's name, as `lowrank-tune examples` lists them.")
    ] = ALL,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder for the copies; it is created if it does not exist.")
    ] = Path("examples"),
    debug: Debug = False,
) -> None:
    """Copy one or all example scripts to a folder, never over an existing file."""
    with report_user_errors(debug):
        scripts = find_examples()
        if name != ALL and name not in scripts:
            names = ", ".join(scripts) or "none"
            hint = did_you_mean(name, [*scripts, ALL]) or f"; there are {names}"
            raise UserError(f"no example is called {name!r:.80}{hint}")
        copies = {folder / script.name: script for script in scripts.values() if name in (ALL, script.stem)}
        _check_targets(folder, list(copies))
        for target, script in copies.items():
            write_new_file(target, script.read_text(encoding="utf-8"), "name another folder")
            print(f"{target}: run it with `python {target}`")


def _check_targets(folder: Path, targets: list[Path]) -> None:
    """Creates the folder. Raises UserError, before anything is copied, if one of the files exists."""
    existing = [str(target) for target in targets if target.exists()]
    if existing:
        verb = "is" if len(existing) == 1 else "are"
        raise UserError(f"{', '.join(existing)}: {verb} there already; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror or error}") from error
