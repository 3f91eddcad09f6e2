"""Measure what a run made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from lowrank_tune.cli.common import INTERRUPTED, Debug, app, loading_message, report_user_errors
from lowrank_tune.errors import UserError

if TYPE_CHECKING:
    from lowrank_tune.evaluation import Options


RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="Folder of a run, a chain, an adapter or a model, or a hub id.")
]
ScoreFile = Annotated[
    str | None,
    typer.Option("--file", help="Only score this file with the run's reward model: responses, or preference pairs."),
]
Dataset = Annotated[
    str | None, typer.Option("--on", help="File, folder or hub data set; else the run's own held-out questions.")
]
DatasetConfig = Annotated[str | None, typer.Option("--name", help="Configuration of --on, a hub data set.")]
Split = Annotated[str | None, typer.Option("--split", help="Split of --on, a hub data set.")]
NumPrompts = Annotated[
    int | None, typer.Option("--num-prompts", min=1, help="Questions; else as the recipe says, or 100.")
]
NumSamples = Annotated[
    int | None, typer.Option("--samples", min=1, max=1024, help="Answers to each; else as the recipe says, or 1.")
]
PassAtK = Annotated[
    list[int] | None,
    typer.Option("--k", min=1, help="pass@K beside pass@1; several times for several; else --samples."),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="0 is greedy, the default for one answer.")
]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.01, max=1.0, help="Draw from the likeliest tokens of this mass only.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer; else as the recipe says, or 256.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Draws questions, answers and intervals; else the recipe's, or 0.")
]
Verifier = Annotated[
    str | None,
    typer.Option("--verifier", help="What says which answers are right: a reward's name, or ./file.py:name."),
]
RewardModelRun = Annotated[
    Path | None, typer.Option("--judge", help="A run that trained a reward model on the same base: who answers better.")
]
Confidence = Annotated[float, typer.Option("--confidence", min=0.5, max=0.999, help="Of the intervals.")]
BaseBits = Annotated[int | None, typer.Option("--bits", help="Of a model that is no run: 4 (the default) or 16.")]
TaskNames = Annotated[
    str | None,
    typer.Option("--tasks", help="Tasks of lm-evaluation-harness, as gsm8k,arc_easy; without --on, only these."),
]
TasksPath = Annotated[
    Path | None, typer.Option("--tasks-path", help="Folder with YAML files of your own tasks; they can run code.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task.")]
ApplyChatTemplate = Annotated[
    bool,
    typer.Option("--apply-chat-template", help="Ask the tasks in the chat template that the model was trained with."),
]


@app.command("eval")
def eval_command(
    run_or_model: RunOrModel,
    file: ScoreFile = None,
    dataset: Dataset = None,
    name: DatasetConfig = None,
    split: Split = None,
    num_prompts: NumPrompts = None,
    num_samples: NumSamples = None,
    pass_at_k: PassAtK = None,
    temperature: Temperature = None,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    verifier: Verifier = None,
    reward_model: RewardModelRun = None,
    confidence: Confidence = 0.95,
    bits: BaseBits = None,
    tasks: TaskNames = None,
    tasks_path: TasksPath = None,
    limit: Limit = None,
    apply_chat_template: ApplyChatTemplate = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="File that the result is added to; else RUN/evals.jsonl.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure base and tuned model on held-out questions: loss, pass@k, reward, wins, tasks, each with its interval."""
    with report_user_errors(debug):
        if file is not None:
            given = {
                "--on": dataset,
                "--tasks": tasks,
                "--judge": reward_model,
                "--verifier": verifier,
                "--k": pass_at_k,
                "--samples": num_samples,
            }
            if others := [name for name, value in given.items() if value is not None]:
                raise UserError(f"--file only scores a file with the run's reward model; leave {', '.join(others)} out")
            _score_file(Path(run_or_model), file, out)
            return
        base_bits: Literal[4, 16] | None = None if bits is None else 4 if bits == 4 else 16
        if bits not in (None, base_bits):
            raise UserError(f"--bits {bits}: it is 4 or 16")
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise UserError(
                f"{out}: {'is a folder' if out.is_dir() else 'there is no such folder'}; name a file for the result"
            )
        with loading_message():
            from lowrank_tune.evaluation import Options

        names = tuple(one.strip() for one in (tasks or "").split(",") if one.strip())
        if tasks is not None and not names:
            raise UserError("--tasks names no task; name some, as --tasks gsm8k,arc_easy")
        _evaluate(
            run_or_model,
            out,
            Options(
                dataset,
                name,
                split,
                num_prompts,
                num_samples,
                tuple(pass_at_k or ()),
                temperature,
                top_p,
                max_new_tokens,
                seed,
                verifier,
                reward_model,
                confidence,
                base_bits,
                names,
                tasks_path,
                limit,
                apply_chat_template,
            ),
        )


def _evaluate(run_or_model: str, out: Path | None, options: Options) -> None:
    """Measures, keeps the result and prints it. Ends with 130 where a person interrupted."""
    from lowrank_tune.evaluation import append_record, evaluate, has_metrics, parse_record
    from lowrank_tune.ui.evals_view import show
    from lowrank_tune.ui.plain import LineLogger

    plain = LineLogger(sys.stderr)
    try:
        result = evaluate(run_or_model, options, plain)
    finally:
        plain.close()
    if not has_metrics(result.record):
        print("interrupted before anything was measured; nothing is kept", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    target = out or result.path
    if target is not None:
        append_record(target, result.record)
    show(parse_record(result.record), result.record["unjudged"], Console(highlight=False))
    print(f"added to {target}" if target is not None else "kept nowhere, since this is no run; --out FILE keeps it")
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _score_file(run: Path, file: str, out: Path | None) -> None:
    """A file of responses, by the reward model of a run."""
    with loading_message():
        from lowrank_tune.ui.plain import LineLogger
        from lowrank_tune.ui.scores_view import show
        from lowrank_tune.validation import score_file

    plain = LineLogger(sys.stderr)
    try:
        scores, pairs = score_file(run, file, plain)
    finally:
        plain.close()
    target = out or run / f"scored-{Path(file).name.removesuffix('.gz').rpartition('.')[0] or Path(file).name}.jsonl"
    lines = [
        json.dumps(
            {
                "place": one.position,
                **({"side": one.side} if one.side else {}),
                "score": one.score,
                "tokens": one.tokens,
            }
        )
        for one in scores
    ]
    try:
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    show(scores, pairs, Console(highlight=False))
    print(f"all scores: {target}")
