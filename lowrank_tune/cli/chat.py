"""`chat`: a conversation with a trained or an untrained model."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from lowrank_tune.cli.common import (
    INTERRUPTED,
    Debug,
    TemplateVariables,
    app,
    check_run_or_model,
    loading_message,
    parse_template_variables,
    report_user_errors,
)


class VariantOption(StrEnum):
    """Which model answers: the base with the adapters off (`base`) or on (`tuned`), or both."""

    base = "base"
    tuned = "tuned"
    both = "both"


class BitWidth(StrEnum):
    """Number of bits of the weights of a base."""

    four = "4"
    sixteen = "16"


Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="Folder of a run, a checkpoint or an adapter; or a model: hub id, folder or tiny-tutor.",
    ),
]
Variant = Annotated[
    VariantOption | None,
    typer.Option("--variant", help="Variant that answers first. Default: tuned, if there is an adapter."),
]
SystemPrompt = Annotated[
    str | None, typer.Option("--system", help="System prompt. Default: that of the run. Empty: none.")
]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy, as for held-out questions.")]
TopP = Annotated[float, typer.Option("--top-p", help="Probability mass of nucleus sampling.")]
TopK = Annotated[int, typer.Option("--top-k", help="Number of most likely tokens to sample from; 0 for all.")]
MinP = Annotated[
    float,
    typer.Option("--min-p", help="Leave out tokens that are less likely than this times the most likely one."),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Maximum length of an answer in tokens.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed and questions give the same answers.")]
Bits = Annotated[BitWidth | None, typer.Option("--bits", help="Bits of the base of a model or an adapter. Default: 4.")]
AsJsonLines = Annotated[
    bool,
    typer.Option(
        "--jsonl",
        help="Each line of the input is a conversation of its own; one JSON object with its answer is printed.",
    ),
]
BasePath = Annotated[
    str | None, typer.Option("--base", help="Folder of the base of a run or an adapter, if it was moved.")
]


@app.command("chat")
def chat_command(
    name: Target,
    variant: Variant = None,
    system: SystemPrompt = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    bits: Bits = None,
    base_path: BasePath = None,
    jsonl: AsJsonLines = False,
    chat_template_kwargs: TemplateVariables = None,
    debug: Debug = False,
) -> None:
    """Chat with what a run trained: adapters on, off, or both side by side. From a pipe: one question for each line,
    plain answers."""
    with report_user_errors(debug):
        kwargs = parse_template_variables(chat_template_kwargs)
        check_run_or_model(name)
        with loading_message():
            from lowrank_tune.chat import SamplingOptions, chat, chat_jsonl

        sampling = SamplingOptions(
            temperature,
            top_p,
            top_k,
            min_p,
            max_new_tokens,
            seed,
        )
        answer = chat_jsonl if jsonl else chat
        try:
            answer(
                name,
                sampling,
                variant and variant.value,
                system,
                None if bits is None else int(bits),
                base_path,
                kwargs,
            )
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error
