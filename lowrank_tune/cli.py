"""The command line. Torch is imported only by the commands that need it, so that help and a faulty recipe take a second."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune import __version__
from lowrank_tune.errors import UserError

if TYPE_CHECKING:
    from lowrank_tune.runner import Outcome

INTERRUPTED = 130
app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="QLoRA fine-tuning for one consumer GPU: one frozen 4-bit base, many voices.")  # fmt: skip
presets = typer.Typer(invoke_without_command=True, help="List the presets, or print or copy one to start your own from.")
app.add_typer(presets, name="presets")


class Screen(StrEnum):
    """`auto` is the best that the terminal can show; `tui` also on a build server; `plain` one line a step."""

    auto = "auto"
    tui = "tui"
    plain = "plain"


class MergeBase(StrEnum):
    """`dequantized`: the weights that were trained over; `original`: those that the base's author published."""

    dequantized = "dequantized"
    original = "original"


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as train.learning_rate=1e-4.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/NAME where it is not given.")]
Ui = Annotated[Screen, typer.Option("--ui", help="What to draw.")]
Preset = Annotated[str, typer.Argument(help="A preset's name, as `lowrank-tune presets` lists them.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@app.command("run")
def run_command(recipe: Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a recipe file.")],
                overrides: Overrides = None, out: Out = None, ui: Ui = Screen.auto, debug: Debug = False) -> None:  # fmt: skip
    """Run a recipe; the same command again continues it."""
    with _sentences(debug):
        from lowrank_tune.recipe import load_any

        loaded = load_any(recipe, *(overrides or []))
        with _starting():
            from lowrank_tune.runner import run

        _end(run(loaded, out=out, ui=ui))


@app.command()
def demo(overrides: Overrides = None, out: Out = None, ui: Ui = Screen.auto, debug: Debug = False) -> None:
    """Teach the tiny base that ships with the package, without GPU or network, by SFT and then by GRPO, and compare before and after."""
    with _sentences(debug):
        from lowrank_tune.recipe import load_any

        loaded = load_any("tiny-rlvr", "name=demo", *(overrides or []))
        with _starting():
            from lowrank_tune.runner import run

        outcome = run(loaded, out=out, ui=ui)
        if outcome.status == "done":
            _before_after(outcome.summary)
        _end(outcome)


@app.command("data")
def data_command(recipe: Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a recipe file.")],
                 overrides: Overrides = None, debug: Debug = False) -> None:  # fmt: skip
    """Show what would be trained on, before anything is: mixture, lengths, faulty rows with their lines, end token, loss mask."""
    with _sentences(debug):
        from lowrank_tune.recipe import Chain, load_any

        loaded = load_any(recipe, *(overrides or []))
        from lowrank_tune.preflight import examine
        from lowrank_tune.ui.data_view import show

        faulty = False
        for stage in loaded.stages if isinstance(loaded, Chain) else (loaded,):
            found = examine(stage, lambda event: None)
            show(found, f"{stage.name}: {stage.algorithm} of {stage.base.model}", Console(highlight=False))
            faulty = faulty or bool(found.faults)
        if faulty:
            raise typer.Exit(UserError.exit_code)


@app.command("eval")
def eval_command(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that trained a reward model.")],
                 file: Annotated[str, typer.Option("--file", help="Responses: rows with a prompt and an answer, or preference pairs.")],
                 out: Annotated[Path | None, typer.Option("--out", help="File for the scores; else RUN/scored-FILE.jsonl.")] = None,
                 debug: Debug = False) -> None:  # fmt: skip
    """Score a file of responses with the reward model of a run."""
    with _sentences(debug):
        with _starting():
            from lowrank_tune.evaluate import score_file
            from lowrank_tune.ui.plain import Plain
            from lowrank_tune.ui.scores_view import show

        plain = Plain(sys.stderr)
        try:
            found, pairs = score_file(run, file, plain)
        finally:
            plain.close()
        target = out or run / f"scored-{Path(file).name.removesuffix('.gz').rpartition('.')[0] or Path(file).name}.jsonl"
        lines = [json.dumps({"place": one.place, **({"side": one.side} if one.side else {}), "score": one.score, "tokens": one.tokens})
                 for one in found]  # fmt: skip
        try:
            target.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
        show(found, pairs, Console(highlight=False))
        print(f"all scores: {target}")


@app.command("verify")
def verify_command(recipe: Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a recipe file, with rewards.")],
                   overrides: Overrides = None,
                   file: Annotated[str | None, typer.Option("--file", help="Responses: rows of the data with a column completion, response "
                                                            "or completions. Without it: the reference answers of the data.")] = None,
                   limit: Annotated[int | None, typer.Option("--limit", min=1, help="Judge only so many.")] = None,
                   out: Annotated[Path | None, typer.Option("--out", help="File for what each reward said of each response.")] = None,
                   debug: Debug = False) -> None:  # fmt: skip
    """Run the rewards over a file of responses: verdicts, times, disagreement. Ends with 1 where a run would stop at these failures."""
    with _sentences(debug):
        from lowrank_tune.recipe import Chain, load_any

        loaded = load_any(recipe, *(overrides or []))
        stages = [stage for stage in (loaded.stages if isinstance(loaded, Chain) else (loaded,)) if stage.rewards]
        if not stages:
            raise UserError(f"{recipe} has no rewards: no algorithm of it learns from completions")
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise UserError(f"{out}: {'is a folder' if out.is_dir() else 'there is no such folder'}; name a file for the verdicts")
        with _starting():
            from lowrank_tune.ui.plain import Plain
            from lowrank_tune.ui.verify_view import show
            from lowrank_tune.verify import verify

        status, lines = 0, list[str]()
        for stage in stages:
            plain = Plain(sys.stderr)
            try:
                found = verify(stage, file, limit, plain)
            finally:
                plain.close()
            show(found, f"{stage.name}, {file or 'reference answers'}", Console(highlight=False))
            lines += [json.dumps({**({"stage": stage.name} if len(stages) > 1 else {}), **line}) for line in found.lines()]
            status = INTERRUPTED if found.interrupted else max(status, int(found.stops() is not None))
            if found.interrupted:
                break
        if out is not None:
            try:
                out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            except OSError as error:
                raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
            print(f"all verdicts: {out}")
        if status:
            raise typer.Exit(status)


@app.command("merge")
def merge_command(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that has ended.")],
                  out: Annotated[Path | None, typer.Option("--out", help="Folder of the merged model; else RUN/merged.")] = None,
                  base: Annotated[MergeBase, typer.Option("--base", help="Weights to merge into: what was trained, or the original.")]
                  = MergeBase.dequantized, debug: Debug = False) -> None:  # fmt: skip
    """Merge what a run trained into its base, in bf16, and compare the result with what was trained. Ends with 1 where they differ."""
    with _sentences(debug):
        with _starting():
            from lowrank_tune.export import Proof, merge
            from lowrank_tune.ui.plain import Plain

        plain = Plain(sys.stderr)

        def show(proof: Proof) -> None:
            plain.close()
            table = Table("trained against merged", "", box=None)
            for name, value in proof.table():
                table.add_row(Text(name), Text(value))
            Console(highlight=False).print(table)

        try:
            print(f"merged: {merge(run, out, base.value, plain, show).folder}")
        finally:
            plain.close()


@app.command("report")
def report_command(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")], debug: Debug = False) -> None:
    """Write RUN/report.html anew: curves, samples, data, recipe, in one file for a browser."""
    with _sentences(debug):
        from lowrank_tune.ui.report import write_report

        print(write_report(run))


@app.command("compare")
def compare_command(runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of runs or chains, finished or not.")],
                    html: Annotated[Path | None, typer.Option("--html", help="File for the page; else compare.html beside RUN.")] = None,
                    debug: Debug = False) -> None:  # fmt: skip
    """Put runs side by side: curves, held-out results, and where their recipes differ; here, and as one page for a browser."""
    with _sentences(debug):
        from lowrank_tune.ui.compare import compare

        print(f"the page: {compare(runs, html)}")


@app.command("doctor")
def doctor_command(debug: Debug = False) -> None:
    """Check this machine: Python, torch, the card, 4-bit arithmetic, versions, disk, terminal. Ends with 1 where something needed fails."""
    with _sentences(debug):
        from lowrank_tune.doctor import examine, show

        findings = examine()
        show(findings, Console(highlight=False))
        if any(finding.level == "fault" for finding in findings):
            raise typer.Exit(1)


@presets.callback()
def list_presets(context: typer.Context) -> None:
    """List the presets, or print or copy one to start your own from."""
    if context.invoked_subcommand is not None:
        return
    with _sentences(False):
        from lowrank_tune.recipe import presets as all_presets

        table = Table("preset", "algorithm", "what it is", box=None)
        for preset, description, algorithm in all_presets():
            table.add_row(preset, algorithm, description)
        Console().print(table)


@presets.command("show")
def show_preset(name: Preset, debug: Debug = False) -> None:
    """Print a preset."""
    with _sentences(debug):
        from lowrank_tune.recipe import find_preset

        sys.stdout.write(find_preset(name).read_text(encoding="utf-8"))


@presets.command("copy")
def copy_preset(name: Preset, file: Annotated[Path | None, typer.Argument(help="NAME.yaml here, where it is not given.")] = None,
                debug: Debug = False) -> None:  # fmt: skip
    """Copy a preset to a file of your own; never over one that is there."""
    with _sentences(debug):
        from lowrank_tune.recipe import find_preset

        text, target = find_preset(name).read_text(encoding="utf-8"), file or Path(f"{name}.yaml")
        try:
            with target.open("x", encoding="utf-8") as opened:
                opened.write(text)
        except OSError as error:
            told = "is there already; name another file" if target.exists() else f"cannot be written: {error.strerror or error}"
            raise UserError(f"{target}: {told}") from error
        print(f"{target}: change it, then `lowrank-tune data {target}` and `lowrank-tune run {target}`")


@app.command("watch")
def watch_command(runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their events.jsonl.")],
                  ui: Ui = Screen.auto, debug: Debug = False) -> None:  # fmt: skip
    """Show runs that happen elsewhere, or happened; several beside each other."""
    with _sentences(debug):
        from lowrank_tune.ui.watch import watch

        watch(runs, plain=ui == Screen.plain)


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of a recipe, for editors."""
    with _sentences(debug):
        from lowrank_tune.recipe import schema as recipe_schema

        print(json.dumps(recipe_schema(), indent=2))


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@contextmanager
def _starting() -> Iterator[None]:
    """Torch and transformers take seconds to import; a person at a terminal sees that something is going on."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status("starting: torch and transformers take a few seconds"):
        yield


@contextmanager
def _sentences(debug: bool) -> Iterator[None]:
    """People see sentences: what a `UserError` says, and of our own mistakes their name and how to see more."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        print(str(error), file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        print("interrupted; what was saved is valid, and the same command continues from there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from error
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            raise
        print(f"internal error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        raise typer.Exit(1) from error


def _end(outcome: Outcome) -> None:
    from lowrank_tune.ui.plain import summary_table

    print(summary_table(outcome.summary, outcome.folder))
    if outcome.status == "interrupted":
        print("interrupted and saved; the same command continues")
        raise typer.Exit(INTERRUPTED)


def _before_after(summary: dict[str, Any]) -> None:
    """The held-out table, and the same questions before and after."""
    console, details = Console(), summary["heldout_details"]
    figures = Table("held-out questions", *details, title="before and after")
    rows = {"exact": "exact answers (pass@1)", **{key: f"one of {key[8:]} exact (pass@{key[8:]})" for key in next(iter(details.values()))
            if key.startswith("pass_at_")}, "stopped": "stops by itself", "length": "tokens an answer"}  # fmt: skip
    for key, label in rows.items():
        figures.add_row(label, *(f"{stats[key]:.1f}" if key == "length" else f"{stats[key]:.1%}" for stats in details.values()))
    console.print(figures)
    answers = Table("question", "gold", *summary["answers"], show_lines=True)
    for several in zip(*summary["answers"].values(), strict=True):
        told = (Text(one["completion"] if one["stopped"] else one["completion"] + " ...") for one in several)
        answers.add_row(several[0]["prompt"], several[0]["gold"], *told)
    console.print(answers)


def main() -> None:
    app()
