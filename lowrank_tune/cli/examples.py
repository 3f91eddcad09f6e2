"""`examples`: lists and copies the example scripts and notebooks."""

from __future__ import annotations

import ast
import re
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.cli.common import Debug, app, report_user_errors
from lowrank_tune.cli.new_file import write_new_file
from lowrank_tune.errors import UserError, did_you_mean
from lowrank_tune.json_files import parse_json

ALL = "all"
COMMAND = re.compile(r": `python [^`]*`")
SENTENCE_END = re.compile(r"(?<=\.)\s")

examples = typer.Typer(
    invoke_without_command=True,
    help="List the example scripts and notebooks, or copy them.",
)
app.add_typer(examples, name="examples")


def find_examples() -> dict[str, Path]:
    """Returns the scripts and notebooks by name. In an installed package they are inside it, in a clone beside it."""
    package = Path(__file__).resolve().parent.parent
    folders = (package / "examples", package.parent / "examples")
    for folder in folders:
        if folder.is_dir():
            files = [*folder.glob("*.py"), *folder.glob("notebooks/*.ipynb")]
            return {file.stem: file for file in sorted(files, key=attrgetter("stem"))}
    return {}


def summarize(example: Path) -> str:
    """Returns what an example does, in one line."""
    text = example.read_text(encoding="utf-8")
    return summarize_script(text) if example.suffix == ".py" else summarize_notebook(text)


def summarize_notebook(text: str) -> str:
    """Returns the heading of a notebook, which is the first line of its first cell."""
    first_cell = parse_json(text)["cells"][0]
    return str(first_cell["source"][0]).strip().removeprefix("# ")


def summarize_script(text: str) -> str:
    """Returns the first sentence of a script's docstring on one line, without the command that runs the script."""
    docstring = ast.get_docstring(ast.parse(text)) or ""
    sentence = SENTENCE_END.split(docstring)[0].replace("\n", " ")
    return COMMAND.sub("", sentence).removesuffix(".")


@examples.callback()
def examples_command(context: typer.Context) -> None:
    """List the example scripts and notebooks, or copy them."""
    if context.invoked_subcommand is not None:
        return
    with report_user_errors(False):
        found = find_examples()
        width = max(map(len, found), default=0)
        for name, example in found.items():
            print(f"{name:<{width}}  {summarize(example)}")
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
    """Copy one or all example scripts and notebooks to a folder, never over an existing file."""
    with report_user_errors(debug):
        found = find_examples()
        if name != ALL and name not in found:
            names = ", ".join(found) or "none"
            hint = did_you_mean(name, [*found, ALL]) or f"; there are {names}"
            raise UserError(f"no example is called {name!r:.80}{hint}")
        copies = {folder / example.name: example for example in found.values() if name in (ALL, example.stem)}
        _check_targets(folder, list(copies))
        for target, example in copies.items():
            write_new_file(target, example.read_text(encoding="utf-8"), "name another folder")
            print(f"{target}: {_how_to_run(target)}")


def _how_to_run(target: Path) -> str:
    return f"run it with `python {target}`" if target.suffix == ".py" else "open it in Jupyter"


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
