"""Export the adapter of a run for other software."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.cli.common import (
    Debug,
    EndedRun,
    app,
    check_run,
    line_logger,
    loading_message,
    report_user_errors,
)
from lowrank_tune.cli.merge import MergeWeights, Weights, print_comparison

if TYPE_CHECKING:
    from lowrank_tune.export.export import ExportOptions
    from lowrank_tune.export.hub import Upload
    from lowrank_tune.ui.terminal.plain import LineLogger


class ExportTarget(StrEnum):
    """`gguf`: base and adapter in one file; `gguf-lora`: the adapter alone for llama.cpp; `ollama`: with a Modelfile;
    `peft`: a copy; `hub`: a repository of the Hugging Face hub."""

    gguf = "gguf"
    gguf_lora = "gguf-lora"
    ollama = "ollama"
    peft = "peft"
    hub = "hub"


class OllamaFormat(StrEnum):
    """`merged`: one model; `adapter`: the adapter over a base model of Ollama."""

    merged = "merged"
    adapter = "adapter"


QUANTIZATION_HELP = (
    "Tensor type of the GGUF: f32, f16, bf16, q8_0, or with llama-quantize q6_k, q5_k_m, q4_k_m, ... Default: f16, "
    "for Ollama q8_0."
)
LLAMA_HELP = (
    "Folder of llama.cpp, or the source package of llama-cpp-python; else LLAMA_CPP_DIR, else it is fetched once."
)

To = Annotated[ExportTarget, typer.Option("--to", help="For which software.")]
OutFolder = Annotated[Path | None, typer.Option("--out", help="Folder to write; else RUN/export/TO.")]
Quantization = Annotated[str | None, typer.Option("--quantization", help=QUANTIZATION_HELP)]
OllamaFormatOption = Annotated[
    OllamaFormat, typer.Option("--ollama-format", help="Ollama: merged model, or adapter on a base model.")
]
OllamaBase = Annotated[
    str,
    typer.Option("--ollama-base", help="Ollama, --ollama-format adapter: base model, a GGUF file or an Ollama name."),
]
System = Annotated[str | None, typer.Option("--system", help="Ollama: the system prompt, else that of the recipe.")]
LlamaCpp = Annotated[Path | None, typer.Option("--llama-cpp", help=LLAMA_HELP)]
Repo = Annotated[str | None, typer.Option("--repo", help="The hub: user/name. Nothing is pushed without it.")]
Public = Annotated[bool, typer.Option("--public", help="The hub: everybody may read it; else it is private.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="The hub: show what would be pushed, and push nothing.")]


@app.command("export")
def export_command(
    run: EndedRun,
    to: To,
    out: OutFolder = None,
    quantization: Quantization = None,
    weights: Weights = MergeWeights.dequantized,
    ollama_format: OllamaFormatOption = OllamaFormat.merged,
    ollama_base: OllamaBase = "./base.gguf",
    system: System = None,
    llama_cpp: LlamaCpp = None,
    repo: Repo = None,
    public: Public = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Write what a run trained for llama.cpp, Ollama or PEFT, or push it to the Hugging Face hub (privately)."""
    with report_user_errors(debug):
        check_run(run)
        with loading_message():
            from lowrank_tune.export.export import ExportOptions

        options = ExportOptions(
            to.value,
            out,
            quantization,
            weights.value,
            ollama_format.value,
            ollama_base,
            system,
            llama_cpp,
            repo,
            public,
            dry_run,
        )
        destination = _export(run, options)
        if to is not ExportTarget.hub:
            outcome = "exported"
        elif dry_run:
            outcome = "would be pushed"
        else:
            outcome = "pushed"
        print(f"{outcome}: {destination}")


def _export(run: Path, options: ExportOptions) -> str:
    """Exports the run, prints comparison or upload, and returns the folder or address."""
    from lowrank_tune.export.export import export

    with line_logger() as logger:
        return export(
            run,
            options,
            logger,
            partial(print_comparison, logger),
            partial(_print_upload, logger),
        )


def _print_upload(logger: LineLogger, upload: Upload) -> None:
    """Prints the repository, who can read it, and the files, after the bar of the logger."""
    logger.close()
    visibility = "everybody can read" if upload.public else "private"
    repository = {True: "a new repository", False: "which exists", None: "not looked up: HF_HUB_OFFLINE"}[upload.new]
    print(f"to {upload.repo} ({repository}, {visibility}): {upload.size / 2**20:,.1f} MiB")
    table = Table("file", "bytes", box=None)
    for name, size in upload.files:
        table.add_row(Text(name), Text(f"{size:,}", justify="right"))
    Console(highlight=False).print(table)
