"""`run` and `demo`: run a recipe."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.cli.common import (
    INTERRUPTED,
    Debug,
    Out,
    Overrides,
    Recipe,
    Ui,
    UiMode,
    app,
    loading_message,
    report_user_errors,
)

if TYPE_CHECKING:
    from lowrank_tune.runner import RunResult


@app.command("run")
def run_command(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    ui: Ui = UiMode.auto,
    debug: Debug = False,
) -> None:
    """Run a recipe; the same command again continues it."""
    with report_user_errors(debug):
        from lowrank_tune.config import backends_of, load_any
        from lowrank_tune.unsloth_import import import_unsloth

        loaded = load_any(recipe, *(overrides or []))
        with loading_message():
            # unsloth has to be imported before torch
            import_unsloth(backends_of(loaded))
            from lowrank_tune.runner import run

        _print_summary(run(loaded, out=out, ui=ui))


@app.command("demo")
def demo_command(
    overrides: Overrides = None,
    out: Out = None,
    ui: Ui = UiMode.auto,
    debug: Debug = False,
) -> None:
    """Train the tiny base that ships with the package by SFT and then by GRPO, without GPU or network, and compare
    before and after."""
    with report_user_errors(debug):
        from lowrank_tune.config import load_any

        loaded = load_any("tiny-rlvr", "name=demo", *(overrides or []))
        with loading_message():
            from lowrank_tune.runner import run

        outcome = run(loaded, out=out, ui=ui)
        if outcome.status == "done":
            _print_before_after(outcome.summary)
        _print_summary(outcome)


def _print_summary(outcome: RunResult) -> None:
    from lowrank_tune.ui.views.summary import summary_table

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(summary_table(outcome.summary, outcome.folder, width))
    if outcome.status == "interrupted":
        print("interrupted and saved; the same command continues")
        raise typer.Exit(INTERRUPTED)


def _print_before_after(summary: dict[str, Any]) -> None:
    """Prints the held-out metrics, and the answers to the same questions, before and after each stage."""
    from lowrank_tune.ui.report.heldout import figure_label, figure_names

    console = Console()
    details = summary["heldout_details"]
    figures = Table(
        "held-out questions",
        *details,
        title="before and after",
    )
    for key in figure_names(details):
        number_format = ".1f" if key == "mean_length" else ".1%"
        figures.add_row(figure_label(key), *(format(metrics[key], number_format) for metrics in details.values()))
    console.print(figures)
    answers = Table(
        "question",
        "gold",
        *summary["answers"],
        show_lines=True,
    )
    for samples in zip(*summary["answers"].values(), strict=True):
        completions: list[Text] = []
        for sample in samples:
            ending = "" if sample["stopped"] else " ..."
            completions.append(Text(sample["completion"] + ending))
        answers.add_row(samples[0]["prompt"], samples[0]["ground_truth"], *completions)
    console.print(answers)
