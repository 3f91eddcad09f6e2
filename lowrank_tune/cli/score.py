"""Score completions with the rewards of a recipe, or with the reward model of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lowrank_tune.cli.common import (
    INTERRUPTED,
    Debug,
    Overrides,
    app,
    check_output_file,
    check_run,
    line_logger,
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
            # neither the name of a preset nor a recipe file
            check_run(path)
        if not path.is_dir():
            _score_with_rewards(
                recipe_or_run,
                overrides or [],
                file,
                limit,
                out,
            )
            return
        unused = list(overrides or [])
        if limit is not None:
            unused.insert(0, "--limit")
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
    from lowrank_tune.config import load_any

    loaded = load_any(recipe, *overrides)
    scored_stages = [stage for stage in loaded.stages if stage.rewards]
    if not scored_stages:
        raise UserError(f"{recipe} has no rewards: no algorithm of it learns from completions")
    with loading_message():
        from lowrank_tune.evaluation import score_completions
        from lowrank_tune.ui.views.scores import show_completion_scores

    status = 0
    records: list[dict[str, Any]] = []
    for stage in scored_stages:
        with line_logger() as emit:
            result = score_completions(
                stage,
                file,
                limit,
                emit,
            )
        show_completion_scores(result, f"{stage.name}, {file or 'reference answers'}", Console(highlight=False))
        for record in result.to_records():
            if len(scored_stages) > 1:
                record = {"stage": stage.name, **record}
            records.append(record)
        if result.interrupted:
            status = INTERRUPTED
            break
        if result.stop_reason() is not None:
            status = 1
    if out is not None:
        _write_scores(out, records)
    if status:
        raise typer.Exit(status)


def _score_with_reward_model(
    run: Path,
    file: str,
    out: Path | None,
) -> None:
    """Scores with the reward model of a run, or of the last stage of a chain that trained one."""
    with loading_message():
        from lowrank_tune.evaluation import score_file
        from lowrank_tune.ui.views.scores import show_reward_model_scores

    with line_logger() as emit:
        responses, pairs = score_file(run, file, emit)
    show_reward_model_scores(responses, pairs, Console(highlight=False))
    if out is None:
        name = Path(file).name
        stem = name.removesuffix(".gz").rpartition(".")[0] or name
        out = run / f"scored-{stem}.jsonl"
    _write_scores(out, [response.to_record() for response in responses])


def _write_scores(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(record) + "\n" for record in records]
    try:
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    print(f"all scores: {path}")
