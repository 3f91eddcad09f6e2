"""What a run trained, for other software."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.cli.common import Debug, app, check_run, loading_message, report_user_errors
from lowrank_tune.cli.merge import MergeWeights, proof_table


class ExportTarget(StrEnum):
    """`gguf`: base and adapter in one file; `gguf-lora`: the adapter alone for llama.cpp; `ollama`: with a Modelfile;
    `peft`: a copy."""

    gguf = "gguf"
    gguf_lora = "gguf-lora"
    ollama = "ollama"
    peft = "peft"
    hub = "hub"


class OllamaFormat(StrEnum):
    """`merged`: one model; `adapter`: the adapter over a base that Ollama has."""

    merged = "merged"
    adapter = "adapter"


QUANTIZATION_HELP = (
    "Tensor type of the GGUF: f32, f16, bf16, q8_0, or with llama-quantize q6_k, q5_k_m, q4_k_m, ... Default: f16, "
    "for Ollama q8_0."
)
LLAMA_HELP = (
    "Folder of llama.cpp, or the source package of llama-cpp-python; else LLAMA_CPP_DIR, else it is fetched once."
)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that has ended.")],
    to: Annotated[ExportTarget, typer.Option("--to", help="For which software.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; else RUN/export/TO.")] = None,
    quantization: Annotated[str | None, typer.Option("--quantization", help=QUANTIZATION_HELP)] = None,
    weights: Annotated[
        MergeWeights,
        typer.Option("--weights", help="Base weights to merge into: dequantized 4-bit, as trained, or original."),
    ] = MergeWeights.dequantized,
    ollama_format: Annotated[
        OllamaFormat, typer.Option("--ollama-format", help="Ollama: merged model, or adapter on a base model.")
    ] = OllamaFormat.merged,
    ollama_base: Annotated[
        str,
        typer.Option(
            "--ollama-base", help="Ollama, --ollama-format adapter: base model, a GGUF file or an Ollama name."
        ),
    ] = "./base.gguf",
    system: Annotated[
        str | None, typer.Option("--system", help="Ollama: the system prompt, else that of the recipe.")
    ] = None,
    llama_cpp: Annotated[Path | None, typer.Option("--llama-cpp", help=LLAMA_HELP)] = None,
    repo: Annotated[
        str | None, typer.Option("--repo", help="The hub: user/name. Nothing is pushed without it.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="The hub: everybody may read it; else it is private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The hub: show what would be pushed, and push nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write what a run trained for llama.cpp, Ollama or PEFT, or push it to the Hugging Face hub (privately)."""
    with report_user_errors(debug):
        check_run(run)
        with loading_message():
            from lowrank_tune.export.export import ExportOptions, export
            from lowrank_tune.export.hub import Upload
            from lowrank_tune.export.merge_check import MergeReport
            from lowrank_tune.ui.terminal.plain import LineLogger

        plain = LineLogger(sys.stderr)

        def show(proof: MergeReport) -> None:
            plain.close()
            Console(highlight=False).print(proof_table(proof.table()))

        def show_upload(planned_upload: Upload) -> None:
            plain.close()
            if planned_upload.public:
                visibility = "everybody can read"
            else:
                visibility = "private"
            repository = {True: "a new repository", False: "which is there", None: "not looked up: HF_HUB_OFFLINE"}
            print(
                f"to {planned_upload.repo} ({repository[planned_upload.new]}, {visibility}): "
                f"{planned_upload.size / 2**20:,.1f} MiB"
            )
            table = Table("file", "bytes", box=None)
            for name, size in planned_upload.files:
                table.add_row(Text(name), Text(f"{size:,}", justify="right"))
            Console(highlight=False).print(table)

        order = ExportOptions(
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
        try:
            destination = export(run, order, plain, show, show_upload)
        finally:
            plain.close()
        print(
            f"{'would be pushed' if dry_run else 'pushed'}: {destination}"
            if to is ExportTarget.hub
            else f"exported: {destination}"
        )
