"""Score completions with the rewards of a recipe, or with the reward model of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.common import (
    INTERRUPTED,
    Debug,
    Overrides,
    app,
    check_output_file,
    check_run,
    loading_message,
    report_user_errors,
)
from lowrank_tune.errors import UserError

RecipeOrRun = Annotated[
    str,
    typer.Argument(
        metavar="PRESET|FILE|RUN",
        help="A preset's name or a recipe file, with rewards; or the folder of a run that trained a reward model.",
    ),
]
CompletionsFile = Annotated[
    str | None,
    typer.Option(
        "--file",
        help="Rows of the data with a column completion, response or completions; with RUN also preference pairs. "
        "Required with RUN. Default with PRESET|FILE: the reference answers of the data.",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Maximum number of completions. Only with PRESET|FILE.")
]
ScoresFile = Annotated[
    Path | None,
    typer.Option("--out", help="JSON lines file for the scores. Default with RUN: RUN/scored-FILE.jsonl."),
]


@app.command("score")
def score_command(
    recipe_or_run: RecipeOrRun,
    overrides: Overrides = None,
    file: CompletionsFile = None,
    limit: Limit = None,
    out: ScoresFile = None,
    debug: Debug = False,
) -> None:
    """Score completions with the rewards of a recipe, or with the reward model of a run. Exits with 1 if a run would
    stop at the failures of the rewards."""
    with report_user_errors(debug):
        from lowrank_tune.config.extends import SUFFIXES

        check_output_file(out)
        path = Path(recipe_or_run)
        if len(path.parts) > 1 and path.suffix not in SUFFIXES:
            check_run(path)  # no preset's name, no recipe file
        if not path.is_dir():
            _score_with_rewards(recipe_or_run, overrides or [], file, limit, out)
            return
        unused = [*(["--limit"] if limit is not None else []), *(overrides or [])]
        if unused:
            raise UserError(
                f"{recipe_or_run} is a folder, so it is read as a run, whose reward model scores all of --file; "
                f"leave out: {', '.join(unused)}"
            )
        if file is None:
            raise UserError(f"{recipe_or_run} is a folder, so it is read as a run: --file is required")
        _score_with_reward_model(path, file, out)


def _score_with_rewards(
    recipe: str,
    overrides: list[str],
    file: str | None,
    limit: int | None,
    out: Path | None,
) -> None:
    """Scores with the rewards of a recipe, or of each stage of a chain that has rewards."""
    from lowrank_tune.config import Chain, load_any

    loaded = load_any(recipe, *overrides)
    stages = [stage for stage in (loaded.stages if isinstance(loaded, Chain) else (loaded,)) if stage.rewards]
    if not stages:
        raise UserError(f"{recipe} has no rewards: no algorithm of it learns from completions")
    with loading_message():
        from lowrank_tune.evaluation.score_completions import score_completions
        from lowrank_tune.ui.terminal.plain import LineLogger
        from lowrank_tune.ui.views.completion_scores import show

    status = 0
    lines = list[str]()
    for stage in stages:
        plain = LineLogger(sys.stderr)
        try:
            result = score_completions(stage, file, limit, plain)
        finally:
            plain.close()
        show(result, f"{stage.name}, {file or 'reference answers'}", Console(highlight=False))
        lines += [
            json.dumps({**({"stage": stage.name} if len(stages) > 1 else {}), **line}) for line in result.to_records()
        ]
        if result.interrupted:
            status = INTERRUPTED
        else:
            status = max(status, int(result.stop_reason() is not None))
        if result.interrupted:
            break
    if out is not None:
        _write_scores(out, lines)
    if status:
        raise typer.Exit(status)


def _score_with_reward_model(run: Path, file: str, out: Path | None) -> None:
    """Scores with the reward model of a run, or of the last stage of a chain that trained one."""
    with loading_message():
        from lowrank_tune.evaluation import score_file
        from lowrank_tune.ui.terminal.plain import LineLogger
        from lowrank_tune.ui.views.reward_model_scores import show

    plain = LineLogger(sys.stderr)
    try:
        scores, pairs = score_file(run, file, plain)
    finally:
        plain.close()
    lines = [
        json.dumps(
            {
                "location": response.location,
                **({"side": response.side} if response.side else {}),
                "score": response.score,
                "tokens": response.tokens,
            }
        )
        for response in scores
    ]
    show(scores, pairs, Console(highlight=False))
    name = Path(file).name
    _write_scores(out or run / f"scored-{name.removesuffix('.gz').rpartition('.')[0] or name}.jsonl", lines)


def _write_scores(path: Path, lines: Iterable[str]) -> None:
    try:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    print(f"all scores: {path}")
