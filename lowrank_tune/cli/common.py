"""Shared parts of the commands: the app, common options, checks of paths, error messages without tracebacks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.status import Status

from lowrank_tune.cli.help_pages import HelpGroup
from lowrank_tune.config.data import template_variable_fault
from lowrank_tune.errors import OutOfMemory, UserError
from lowrank_tune.json_files import parse_json
from lowrank_tune.ui import escape_lines
from lowrank_tune.ui.cell_output import in_cell
from lowrank_tune.ui.run_paths import is_folder_of_runs, newest_run

if TYPE_CHECKING:
    from lowrank_tune.ui.terminal.plain import LineLogger

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
RUNS = Path("runs")
MAX_LISTED_RUNS = 8

app = typer.Typer(
    cls=HelpGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="QLoRA fine-tuning for one consumer GPU: one frozen 4-bit base, many LoRA adapters.",
)


class UiMode(StrEnum):
    """`auto`: the dashboard, if the terminal can show it; `tui`: the dashboard; `plain`: one line for each step."""

    auto = "auto"
    tui = "tui"
    plain = "plain"


Recipe = Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a recipe file.")]
EndedRun = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that has ended.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, as train.learning_rate=1e-4.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run. Default: runs/NAME.")]
Ui = Annotated[UiMode, typer.Option("--ui", help="What to draw.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
TemplateVariables = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="Variables of the chat template, as '{\"enable_thinking\": false}'. Default: those of the recipe.",
    ),
]


def parse_template_variables(text: str | None) -> dict[str, bool | int | float | str]:
    """Returns the variables in --chat-template-kwargs. Raises UserError."""
    if text is None:
        return {}
    try:
        values = parse_json(text)
    except ValueError:
        values = None
    is_flat = isinstance(values, dict) and all(isinstance(value, bool | int | float | str) for value in values.values())
    if not is_flat:
        raise UserError(
            f"--chat-template-kwargs {text}: expected a JSON object of names and values, "
            "such as '{\"enable_thinking\": false}'"
        )
    for name, value in values.items():
        fault = template_variable_fault(name, value)
        if fault is not None:
            raise UserError(f"--chat-template-kwargs: `{name}` {fault}")
    return dict(values)


def check_output_file(path: Path | None) -> None:
    """Raises UserError if `path` is a folder, or is in a folder that does not exist."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the path of a file to write")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no such folder; give the path of a file to write")


def check_run(run: Path, kind: str = "run") -> None:
    """Raises UserError if the path does not exist; the message names runs with a similar name, or the runs there.

    It is also raised for a folder that contains runs; the message names the newest one.
    """
    try:
        if run.exists():
            if is_folder_of_runs(run):
                raise UserError(f"{run}: contains runs and is no {kind}; did you mean `{newest_run(run)}`, the newest?")
            return
    # a name that is too long, or a folder that cannot be read
    except OSError as error:
        raise UserError(f"{run}: {error.strerror}") from error
    folders = [RUNS]
    if run.parent.is_dir() and run.parent not in (Path(), RUNS):
        folders.insert(0, run.parent)
    for folder in folders:
        names = {found.parent.name: str(found.parent) for found in sorted(folder.glob("*/run.json"))}
        similar = get_close_matches(
            run.name,
            names,
            n=1,
            cutoff=0.6,
        )
        if similar:
            raise UserError(f"{run}: there is no such {kind}; did you mean `{names[similar[0]]}`?")
        if names:
            listed = list(names.values())[:MAX_LISTED_RUNS]
            if len(names) > MAX_LISTED_RUNS:
                listed.append("...")
            raise UserError(f"{run}: there is no such {kind}; runs here: {', '.join(listed)}")
    searched = " or ".join(f"{folder}/" for folder in folders)
    raise UserError(f"{run}: there is no such {kind}, and no run in {searched}")


def check_run_or_model(name: str) -> None:
    """Raises UserError as `check_run` does, if the name is a path and cannot be the Hub id of a model."""
    in_runs = Path(name).parts[:1] == (str(RUNS),)
    if not name.startswith((".", "/", "~")) and name.count("/") <= 1 and not in_runs:
        return
    path = Path(name)
    # ~NAME of a user that does not exist stays as it is
    with suppress(RuntimeError):
        path = path.expanduser()
    check_run(path, "run or model")


@contextmanager
def status_message(text: str) -> Iterator[Status | None]:
    """Yields a line with a message at a terminal, None elsewhere. It disappears at the end."""
    console = Console(stderr=True)
    if not console.is_terminal or in_cell(os.environ):
        yield None
        return
    with console.status(text) as status:
        yield status


@contextmanager
def loading_message() -> Iterator[None]:
    """Shows a message at a terminal while torch and transformers are imported, which takes seconds."""
    with status_message("starting: torch and transformers take a few seconds"):
        yield


@contextmanager
def line_logger() -> Iterator[LineLogger]:
    """Yields a logger that prints events to stderr, and closes it."""
    from lowrank_tune.ui.terminal.plain import LineLogger

    with closing(LineLogger(sys.stderr)) as logger:
        yield logger


@contextmanager
def report_user_errors(debug: bool) -> Iterator[None]:
    """Prints user errors without a traceback, and other errors with a hint to `--debug`."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        # a name of a file or of a run can have any character in it
        print(escape_lines(str(error)), file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        print("interrupted; what was saved is valid, and the same command continues from there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from error
    # `main` handles a closed pipe
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            raise
        # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error)):
            first_line = str(error).partition("\n")[0]
            print(f"out of memory: {first_line}", file=sys.stderr)
            raise typer.Exit(OutOfMemory.exit_code) from error
        print(f"internal error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        raise typer.Exit(1) from error
