"""What the commands share: the app, options by name, and sentences instead of tracebacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.help_pages import HelpGroup
from lowrank_tune.errors import OutOfMemory, UserError
from lowrank_tune.ui import escape_control_chars

if TYPE_CHECKING:
    from lowrank_tune.ui.terminal.plain import LineLogger

INTERRUPTED = 130

app = typer.Typer(
    cls=HelpGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="QLoRA fine-tuning for one consumer GPU: one frozen 4-bit base, many LoRA adapters.",
)


class UiMode(StrEnum):
    """`auto` is the best that the terminal can show; `tui` also on a build server; `plain` one line a step."""

    auto = "auto"
    tui = "tui"
    plain = "plain"


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, as train.learning_rate=1e-4.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/NAME where it is not given.")]
Ui = Annotated[UiMode, typer.Option("--ui", help="What to draw.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def check_output_file(path: Path | None) -> None:
    """Raises UserError if `path` is a folder, or lies in a folder that does not exist."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(
            f"{path}: {'is a folder' if path.is_dir() else 'there is no such folder'}; give the path of a file to write"
        )


RUNS = Path("runs")
MAX_NAMES = 8
"""Runs that a message lists."""


def check_run(run: Path, what: str = "run") -> None:
    """Raises UserError if there is nothing at `run`; the message names the runs that are near."""
    try:
        if run.exists():
            return
    except OSError as error:  # a name that is too long, a folder that cannot be read
        raise UserError(f"{run}: {error.strerror}") from error
    folders = dict.fromkeys([run.parent if run.parent.is_dir() and run.parent != Path() else RUNS, RUNS])
    for folder in folders:
        names = {found.parent.name: str(found.parent) for found in sorted(folder.glob("*/run.json"))}
        if near := get_close_matches(run.name, names, n=1, cutoff=0.6):
            raise UserError(f"{run}: there is no such {what}; did you mean `{names[near[0]]}`?")
        if names:
            listed = ", ".join([*names.values()][:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
            raise UserError(f"{run}: there is no such {what}; runs here: {listed}")
    raise UserError(f"{run}: there is no such {what}, and no run in {' or '.join(f'{folder}/' for folder in folders)}")


def check_run_or_model(name: str) -> None:
    """As `check_run`, for a name that can also be the id of a model: of those only paths are checked."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).parts[:1] == (str(RUNS),):
        path = Path(name)
        with suppress(RuntimeError):  # ~NAME of a user that does not exist
            path = path.expanduser()
        check_run(path, "run or model")


@contextmanager
def loading_message() -> Iterator[None]:
    """Torch and transformers take seconds to import; a person at a terminal sees that something is going on."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status("starting: torch and transformers take a few seconds"):
        yield


@contextmanager
def line_logger() -> Iterator[LineLogger]:
    """Yields a logger that prints events to stderr, and closes it."""
    from lowrank_tune.ui.terminal.plain import LineLogger

    logger = LineLogger(sys.stderr)
    try:
        yield logger
    finally:
        logger.close()


@contextmanager
def report_user_errors(debug: bool) -> Iterator[None]:
    """People see sentences: what a `UserError` says, and of our own mistakes their name and how to see more."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        # a name of a file or of a run can have any character in it
        print("\n".join(map(escape_control_chars, str(error).split("\n"))), file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        print("interrupted; what was saved is valid, and the same command continues from there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from error
    except (typer.Exit, BrokenPipeError):  # `main` handles a closed pipe
        raise
    except Exception as error:
        if debug:
            raise
        # torch's is one
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error)):
            print(f"out of memory: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            raise typer.Exit(OutOfMemory.exit_code) from error
        print(f"internal error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        raise typer.Exit(1) from error
