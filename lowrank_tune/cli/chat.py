"""Talk to what a run made."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Literal

import typer

from lowrank_tune.cli.common import INTERRUPTED, Debug, app, check_run_or_model, loading_message, report_user_errors


class VariantOption(StrEnum):
    """Which model answers: the base with the adapters off (`base`) or on (`tuned`), or both."""

    base = "base"
    tuned = "tuned"
    both = "both"


class BitWidth(StrEnum):
    """In how many bits a base is loaded."""

    four = "4"
    sixteen = "16"


@app.command("chat")
def chat_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="Folder of a run, a checkpoint or an adapter; or a model: hub id, folder or tiny-tutor.",
        ),
    ],
    variant: Annotated[
        VariantOption | None,
        typer.Option("--variant", help="Variant that answers first. Default: tuned, if there is an adapter."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System prompt; else the run's own. Empty: none.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 is greedy, as held-out questions are asked.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest tokens of this share.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw among so many of the likeliest tokens; 0 for all.")] = 0,
    min_p: Annotated[
        float, typer.Option("--min-p", help="Leave out what is less likely than this times the likeliest.")
    ] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="The same seed and questions give the same answers.")] = 0,
    bits: Annotated[
        BitWidth | None, typer.Option("--bits", help="Of a model or an adapter: how to load the base; else 4.")
    ] = None,
    base_path: Annotated[
        str | None, typer.Option("--base", help="Of a run or an adapter: where its base lies now.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Talk to what a run trained: adapters on, off, or both side by side. From a pipe: one question a line in, plain
    answers out."""
    with report_user_errors(debug):
        check_run_or_model(name)
        with loading_message():
            from lowrank_tune.chat import SamplingOptions, chat

        sampling = SamplingOptions(temperature, top_p, top_k, min_p, max_new_tokens, seed)
        base_bits: Literal[4, 16] | None = None if bits is None else 4 if bits == BitWidth.four else 16
        try:
            chat(name, sampling, variant and variant.value, system, base_bits, base_path)
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error
