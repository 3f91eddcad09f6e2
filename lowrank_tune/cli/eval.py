"""Evaluate a run or a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from lowrank_tune.cli.common import (
    INTERRUPTED,
    Debug,
    TemplateVariables,
    app,
    check_output_file,
    check_run_or_model,
    line_logger,
    loading_message,
    parse_template_variables,
    report_user_errors,
)
from lowrank_tune.errors import UserError

if TYPE_CHECKING:
    from lowrank_tune.evaluation import Options


RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="Folder of a run, a chain, an adapter or a model, or a hub id.")
]
Dataset = Annotated[
    str | None,
    typer.Option("--dataset", help="File, folder or hub data set. Default: the held-out questions of the run."),
]
DatasetConfig = Annotated[
    str | None, typer.Option("--dataset-config", help="Configuration of a hub data set in --dataset.")
]
Split = Annotated[str | None, typer.Option("--split", help="Split of a hub data set in --dataset.")]
NumPrompts = Annotated[
    int | None, typer.Option("--num-prompts", min=1, help="Number of prompts. Default: as in the recipe, or 100.")
]
NumSamples = Annotated[
    int | None,
    typer.Option("--num-samples", min=1, max=1024, help="Answers per prompt. Default: as in the recipe, or 1."),
]
PassAtK = Annotated[
    list[int] | None,
    typer.Option(
        "--pass-at-k",
        min=1,
        metavar="K",
        help="Report pass@K beside pass@1; can be repeated. Default: --num-samples.",
    ),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="0 is greedy, the default for one answer per prompt.")
]
TopP = Annotated[float, typer.Option("--top-p", min=0.01, max=1.0, help="Probability mass of nucleus sampling.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer. Default: as in the recipe, or 256."),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Seed of prompts, sampling and intervals. Default: as in the recipe, or 0."),
]
Verifier = Annotated[
    str | None,
    typer.Option("--verifier", help="Reward that grades answers as right or wrong: its name, or ./file.py:name."),
]
RewardModelRun = Annotated[
    Path | None,
    typer.Option("--reward-model", help="Run with a reward model on the same base, for win rates against the base."),
]
Confidence = Annotated[
    float, typer.Option("--confidence", min=0.5, max=0.999, help="Confidence level of the intervals.")
]
BaseBits = Annotated[
    int | None, typer.Option("--bits", help="Bits of the weights of a model that is not a run: 4 (the default) or 16.")
]
TaskNames = Annotated[
    str | None,
    typer.Option(
        "--tasks", help="Tasks of lm-evaluation-harness, for example gsm8k,arc_easy; without --dataset, only these."
    ),
]
TasksPath = Annotated[
    Path | None, typer.Option("--tasks-path", help="Folder with YAML files of your own tasks; they can run code.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Maximum number of documents per task.")]
ApplyChatTemplate = Annotated[
    bool, typer.Option("--apply-chat-template", help="Apply the chat template of the training to the tasks.")
]


@app.command("eval")
def eval_command(
    run_or_model: RunOrModel,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
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
    chat_template_kwargs: TemplateVariables = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to append the result to. Default: RUN/evals.jsonl.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Evaluate base and tuned model on held-out questions: loss, pass@k, reward, win rate, tasks, with confidence
    intervals."""
    with report_user_errors(debug):
        base_bits = _parse_bits(bits)
        kwargs = parse_template_variables(chat_template_kwargs)
        check_output_file(out)
        check_run_or_model(run_or_model)
        with loading_message():
            from lowrank_tune.evaluation import Options

        options = Options(
            dataset,
            dataset_config,
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
            _parse_tasks(tasks),
            tasks_path,
            limit,
            apply_chat_template,
            kwargs,
        )
        _evaluate(run_or_model, out, options)


def _parse_bits(bits: int | None) -> Literal[4, 16] | None:
    """Checks --bits. Raises UserError."""
    if bits is None:
        return None
    if bits == 4:
        return 4
    if bits == 16:
        return 16
    raise UserError(f"--bits {bits}: it must be 4 or 16")


def _parse_tasks(tasks: str | None) -> tuple[str, ...]:
    """Returns the names in --tasks. Raises UserError if there are none."""
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if tasks is not None and not names:
        raise UserError("--tasks is empty; give names of tasks, for example --tasks gsm8k,arc_easy")
    return names


def _evaluate(
    run_or_model: str,
    out: Path | None,
    options: Options,
) -> None:
    """Evaluates, appends the result to its file and prints it. Exits with 130 after an interruption."""
    from lowrank_tune.evaluation import (
        append_record,
        evaluate,
        has_metrics,
        parse_record,
    )
    from lowrank_tune.ui.views.evaluation import show

    with line_logger() as emit:
        result = evaluate(run_or_model, options, emit)
    if not has_metrics(result.record):
        print("interrupted before anything was measured; there is no result", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    target = out or result.path
    if target is None:
        outcome = "not saved, since this is not a run; --out FILE saves it"
    else:
        append_record(target, result.record)
        outcome = f"added to {target}"
    show(parse_record(result.record), result.record["ungraded"], Console(highlight=False))
    print(outcome)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
