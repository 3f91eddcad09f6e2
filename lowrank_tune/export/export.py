"""`export`: what a run trained, as other software takes it. Every check that can be made before the work is made before
it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_tune import __version__
from lowrank_tune.assembly.finished_run import FinishedRun, adapters_in, check_base, load_finished_run
from lowrank_tune.checkpoint import load
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.export.combine_lora import cannot_combine_reason, combine_adapters, saved_lora_adapter
from lowrank_tune.export.export_model_card import gguf_lora_card, gguf_model_card, slug
from lowrank_tune.export.gguf import llama_cpp
from lowrank_tune.export.gguf.lora import TYPES, gguf_module, gguf_tensors, shape_of, write_gguf_lora
from lowrank_tune.export.gguf.model import BITS_PER_WEIGHT, NATIVE_OUTTYPES, convert, estimate_gguf_size, quantize
from lowrank_tune.export.hub import EXCLUDED_FILES, Upload, push
from lowrank_tune.export.merge import BaseWeights, find_existing_merge, merge
from lowrank_tune.export.merge_check import MergeReport
from lowrank_tune.export.modelfile import eos_tokens_of, has_bos, modelfile_text
from lowrank_tune.export.output_folder import check_disk_space, check_overwritable, export_folder
from lowrank_tune.model.base import count_weights, load_base, load_config, load_tokenizer, pick_device
from lowrank_tune.model.rotary import fixed_rope

ExportFormat = Literal["gguf", "gguf-lora", "ollama", "peft", "hub"]
DEFAULT_OUTTYPE = {"gguf": "f16", "gguf-lora": "f32", "ollama": "q8_0", "adapter": "f32"}


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export. `quantization` is the type of the GGUF tensors (None: the default of the format), `weights`
    are the base weights to merge into. `ollama_format` is one model (`merged`), or an `adapter` over `ollama_base`."""

    to: ExportFormat
    out: Path | None = None
    quantization: str | None = None
    weights: BaseWeights = "dequantized"
    ollama_format: Literal["merged", "adapter"] = "merged"
    ollama_base: str = "./base.gguf"
    system: str | None = None
    llama_cpp: Path | None = None
    repo: str | None = None
    public: bool = False
    dry_run: bool = False


def export(
    run: Path,
    options: ExportOptions,
    emit: Emit,
    show: Callable[[MergeReport], None],
    show_upload: Callable[[Upload], None],
    device: torch.device | None = None,
) -> str:
    """Exports what a run trained, and returns where it lies: a folder, or an address. `show` hears how a merged model
    compares with what was trained, `show_upload` what will be pushed.

    Raises UserError where it cannot be done, TrainingError where it failed; then nothing half-written stays.
    """
    if unused := _unused_options(options):
        raise UserError(
            f"{', '.join(unused)} {'does' if len(unused) == 1 else 'do'} nothing with --to {options.to}"
            + (f" --ollama-format {options.ollama_format}" if options.to == "ollama" else "")
        )
    finished = load_finished_run(run)
    load(finished.final, "final")  # every byte of it is verified
    if options.to == "hub":
        if options.repo is None:
            raise UserError("--to hub needs --repo user/name: nothing is pushed anywhere by itself")
        return push(finished.final, options.repo, options.public, show_upload, options.dry_run)
    target = options.out or finished.path / "export" / options.to
    check_overwritable(target)
    if options.to == "peft":
        _copy(finished, options, target, emit)
    elif options.to == "gguf-lora" or (options.to == "ollama" and options.ollama_format == "adapter"):
        _lora(finished, options, target, emit, device)
    else:
        _model(finished, options, target, emit, show, device)
    return str(target)


def _unused_options(options: ExportOptions) -> list[str]:
    """Options that were given and would do nothing."""
    defaults = ExportOptions(options.to)
    merges = options.to == "gguf" or (options.to == "ollama" and options.ollama_format == "merged")
    used = {
        "--out": options.to != "hub",
        "--quantization": options.to not in ("hub", "peft"),
        "--weights": merges,
        "--llama-cpp": merges,
        "--ollama-format": options.to == "ollama",
        "--ollama-base": options.to == "ollama" and options.ollama_format == "adapter",
        "--system": options.to == "ollama",
        "--repo": options.to == "hub",
        "--public": options.to == "hub",
        "--dry-run": options.to == "hub",
    }
    return [
        option
        for option, does in used.items()
        if not does and getattr(options, name := option[2:].replace("-", "_")) != getattr(defaults, name)
    ]


def _copy(run: FinishedRun, options: ExportOptions, target: Path, emit: Emit) -> None:
    """The adapter's folder as it is."""
    check_disk_space(target, sum(path.stat().st_size for path in run.final.rglob("*") if path.is_file()), "the copy")
    with export_folder(target, _manifest_fields(run, options), emit) as folder:
        shutil.copytree(run.final, folder, ignore=shutil.ignore_patterns(*EXCLUDED_FILES), dirs_exist_ok=True)


def _lora(
    run: FinishedRun,
    options: ExportOptions,
    target: Path,
    emit: Emit,
    device: torch.device | None,
) -> None:
    outtype = _outtype(options, "adapter", TYPES)
    gguf_module()
    shape = shape_of(load_config(run.base))
    adapters = [saved_lora_adapter(adapter.config.to_dict(), adapter.tensors) for adapter in adapters_in(run).values()]
    if (reason := cannot_combine_reason(adapters)) is not None:
        raise UserError(f"this adapter cannot be written as GGUF: {reason}")
    config, tensors = combine_adapters(adapters)
    gguf_tensors(config, tensors, shape)
    check_disk_space(target, sum(4 * tensor.numel() for tensor in tensors.values()), "the adapter")
    _compare_base(run, emit, device)
    file = f"{slug(run.recipe)}-lora-{outtype}.gguf"
    eos_tokens = eos_tokens_of(run)
    with export_folder(target, _manifest_fields(run, options, quantization=outtype), emit) as folder:
        write_gguf_lora(folder / file, run.recipe.name or run.recipe.algorithm, config, tensors, shape, outtype)
        if options.to == "ollama":
            (folder / "Modelfile").write_text(
                modelfile_text(run, options.system, options.ollama_base, f"./{file}", None, emit), encoding="utf-8"
            )
        _write_card(
            folder,
            gguf_lora_card(
                run.recipe,
                file,
                outtype,
                options.ollama_base if options.to == "ollama" else None,
                eos_tokens,
                fixed_rope(load_config(run.base), run.rope_factors),
            ),
        )


def _compare_base(run: FinishedRun, emit: Emit, device: torch.device | None) -> None:
    """The adapter means nothing over another base than the one that was trained: tensor by tensor, where this machine
    can tell."""
    at = device or pick_device()
    if run.facts.get("device", at.type) != at.type:
        emit(
            LogMessage(
                level="warning",
                message=f"the base was not compared with the trained one: that can be done on "
                f"{run.facts['device']} only",
            )
        )
        return
    check_base(run, load_base(run.base, load_tokenizer(run.base), at, rope_factors=run.rope_factors))


def _model(
    run: FinishedRun,
    options: ExportOptions,
    target: Path,
    emit: Emit,
    show: Callable[[MergeReport], None],
    device: torch.device | None,
) -> None:
    outtype = _outtype(options, options.to, BITS_PER_WEIGHT)
    quantizer = llama_cpp.find_quantizer(options.llama_cpp)
    if outtype not in NATIVE_OUTTYPES and quantizer is None:
        raise UserError(
            f"{outtype} needs llama.cpp's quantizer, which is not installed. Pass the folder of a built llama.cpp with "
            "--llama-cpp, run `pip install llama-cpp-python` (it compiles for minutes), or use --quantization q8_0. "
            "`ollama create --quantize q4_K_M` quantizes a 16-bit export (--quantization f16)"
        )
    existing = find_existing_merge(run, options.weights)
    weights = count_weights(run.base)
    check_disk_space(
        target,
        estimate_gguf_size(weights, outtype) + (0 if existing else 2 * weights),
        f"the model in {outtype}",
    )
    converter = llama_cpp.converter_folder(options.llama_cpp, emit)
    architectures = load_config(run.base).architectures or []
    if architectures and not llama_cpp.supports_architecture(converter, architectures):
        raise UserError(f"llama.cpp's converter knows no {architectures[0]}; `--to peft` copies the adapter as it is")
    file = f"{slug(run.recipe)}-{outtype}.gguf"
    eos_tokens = eos_tokens_of(run)
    with export_folder(
        target,
        _manifest_fields(run, options, quantization=outtype, weights=options.weights),
        emit,
    ) as folder:
        if existing is not None:
            emit(LogMessage(message=f"{existing.folder} holds this adapter already merged, and is taken"))
            show(existing.report)
        merged = existing or merge(run.path, folder / "merged", options.weights, emit, show, device)
        _convert(run, converter, quantizer, merged.folder, folder / file, outtype, emit)
        shutil.rmtree(folder / "merged", ignore_errors=True)
        if options.to == "ollama":
            (folder / "Modelfile").write_text(
                modelfile_text(run, options.system, f"./{file}", None, folder / file, emit), encoding="utf-8"
            )
        _write_card(
            folder,
            gguf_model_card(
                run.recipe,
                file,
                outtype,
                options.weights,
                merged.report.table(),
                eos_tokens,
                options.to == "ollama",
                fixed_rope(load_config(run.base), run.rope_factors),
            ),
        )


def _convert(
    run: FinishedRun,
    converter: Path,
    quantizer: llama_cpp.Quantizer | None,
    merged: Path,
    file: Path,
    outtype: str,
    emit: Emit,
) -> None:
    """The file of a merged model; the small types by way of one in 16 bits."""
    name = run.recipe.name or run.recipe.algorithm
    adds_bos = has_bos(run)
    if outtype in NATIVE_OUTTYPES:
        convert(converter, merged, file, outtype, name, adds_bos, emit)
        return
    assert quantizer is not None
    wide = file.with_name("wide.gguf")
    convert(converter, merged, wide, "bf16", name, adds_bos, emit)
    shutil.rmtree(file.with_name("merged"), ignore_errors=True)  # the room is wanted
    quantize(quantizer, wide, file, outtype, emit)
    wide.unlink()


def _outtype(options: ExportOptions, export_target: str, choices: Mapping[str, object]) -> str:
    outtype = (options.quantization or DEFAULT_OUTTYPE[export_target]).lower()
    if outtype not in choices:
        raise UserError(f"--quantization {outtype} is not supported by this export; supported: {', '.join(choices)}")
    return outtype


def _manifest_fields(run: FinishedRun, options: ExportOptions, **more: str) -> dict[str, Any]:
    base = run.recipe.base.model.partition("@")[0]
    return {
        "made_by": f"lowrank_tune {__version__}",
        "to": options.to,
        **({"ollama_format": options.ollama_format} if options.to == "ollama" else {}),
        "base": base,
        "revision": run.facts.get("revision"),
        "adapter": run.fingerprint(),
        **more,
    }


def _write_card(folder: Path, text: str) -> None:
    (folder / "README.md").write_bytes(text.encode("utf-8", "replace"))
