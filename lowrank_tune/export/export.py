"""`lowrank-tune export`: the adapter of a run in the formats of other software. All checks that are possible before the
work come first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_tune import __version__
from lowrank_tune.assembly.finished_run import (
    FinishedRun,
    adapters_in,
    check_base,
    load_finished_run,
)
from lowrank_tune.checkpoint import load
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage, ignore_event, warning
from lowrank_tune.export.combine_lora import cannot_combine_reason, combine_adapters, saved_lora_adapter
from lowrank_tune.export.gguf import llama_cpp
from lowrank_tune.export.gguf.lora import (
    TYPES,
    gguf_module,
    gguf_tensors,
    shape_of,
    write_gguf_lora,
)
from lowrank_tune.export.gguf.model import (
    BITS_PER_WEIGHT,
    NATIVE_OUTTYPES,
    convert,
    estimate_gguf_size,
    quantize,
)
from lowrank_tune.export.hub import EXCLUDED_FILES, Upload, push
from lowrank_tune.export.merge import BaseWeights, find_existing_merge, merge
from lowrank_tune.export.merge_check import MergeReport
from lowrank_tune.export.model_card import gguf_lora_card, gguf_model_card, slug
from lowrank_tune.export.modelfile import eos_tokens_of, has_bos, modelfile_text
from lowrank_tune.export.output_folder import check_disk_space, check_overwritable, export_folder
from lowrank_tune.model.base import (
    count_weights,
    load_base,
    load_config,
    load_tokenizer,
    pick_device,
)
from lowrank_tune.model.rotary import FixedRope, fixed_rope

ExportFormat = Literal["gguf", "gguf-lora", "ollama", "peft", "hub"]
DEFAULT_OUTTYPE = {
    "gguf": "f16",
    "gguf-lora": "f32",
    "ollama-merged": "q8_0",
    "ollama-adapter": "f32",
}
USED_OPTIONS = {
    "gguf": {"out", "quantization", "weights", "llama_cpp"},
    "gguf-lora": {"out", "quantization"},
    "ollama-merged": {
        "out",
        "quantization",
        "weights",
        "llama_cpp",
        "ollama_format",
        "system",
    },
    "ollama-adapter": {
        "out",
        "quantization",
        "ollama_format",
        "ollama_base",
        "system",
    },
    "peft": {"out"},
    "hub": {"repo", "public", "dry_run"},
}
"""Options that each kind of export uses."""


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

    @property
    def kind(self) -> str:
        """The format, of Ollama with its own format: a key of `USED_OPTIONS`."""
        if self.to == "ollama":
            return f"ollama-{self.ollama_format}"
        return self.to


def _show_nothing(_: MergeReport | Upload) -> None: ...


def export(
    run: Path,
    options: ExportOptions,
    emit: Emit = ignore_event,
    show: Callable[[MergeReport], None] = _show_nothing,
    show_upload: Callable[[Upload], None] = _show_nothing,
    device: torch.device | None = None,
) -> str:
    """Exports the adapter of a run, and returns the folder or address of the export. `show` is called with the
    comparison of a merged model, `show_upload` with the files of a push.

    Raises UserError if the run cannot be exported, TrainingError if the export fails; then no partial export is left.
    """
    _check_unused_options(options)
    finished = load_finished_run(run)
    # verifies every byte of it
    load(finished.final, "final")
    if options.to == "hub":
        if options.repo is None:
            raise UserError("--to hub needs --repo user/name: there is no default repository")
        return push(
            finished.final,
            options.repo,
            options.public,
            show_upload,
            options.dry_run,
        )
    target = options.out or finished.path / "export" / options.to
    check_overwritable(target)
    job = _Export(finished, options, target, emit)
    if options.to == "peft":
        job.copy()
    elif options.kind in ("gguf-lora", "ollama-adapter"):
        job.lora(device)
    else:
        job.model(show, device)
    return str(target)


def _check_unused_options(options: ExportOptions) -> None:
    """Raises UserError if options are set that this kind of export does not use."""
    unused = []
    for field in fields(ExportOptions):
        is_used = field.name == "to" or field.name in USED_OPTIONS[options.kind]
        if not is_used and getattr(options, field.name) != field.default:
            unused.append("--" + field.name.replace("_", "-"))
    if unused:
        export_format = f"--to {options.to}"
        if options.to == "ollama":
            export_format = f"{export_format} --ollama-format {options.ollama_format}"
        verb = "does" if len(unused) == 1 else "do"
        raise UserError(f"{', '.join(unused)} {verb} nothing with {export_format}")


@dataclass(frozen=True)
class _Export:
    """One export of a run to a folder."""

    run: FinishedRun
    options: ExportOptions
    target: Path
    emit: Emit

    def copy(self) -> None:
        """Copies the folder of the adapter."""
        size = sum(path.stat().st_size for path in self.run.final.rglob("*") if path.is_file())
        check_disk_space(self.target, size, "the copy")
        with export_folder(self.target, self._manifest(), self.emit, size) as folder:
            ignored = shutil.ignore_patterns(*EXCLUDED_FILES)
            shutil.copytree(
                self.run.final,
                folder,
                ignore=ignored,
                dirs_exist_ok=True,
            )

    def lora(self, device: torch.device | None) -> None:
        """Writes the adapter alone as a GGUF file, for Ollama with a Modelfile."""
        run = self.run
        outtype = self._outtype(TYPES)
        gguf_module()
        shape = shape_of(load_config(run.base))
        adapters = []
        for saved in adapters_in(run).values():
            adapters.append(saved_lora_adapter(saved.config.to_dict(), saved.tensors))
        reason = cannot_combine_reason(adapters)
        if reason is not None:
            raise UserError(f"this adapter cannot be written as GGUF: {reason}")
        config, tensors = combine_adapters(adapters)
        # raises UserError for a module that the file cannot contain
        gguf_tensors(config, tensors, shape)
        size = sum(4 * tensor.numel() for tensor in tensors.values())
        check_disk_space(self.target, size, "the adapter")
        _compare_base(run, self.emit, device)
        file = f"{slug(run.recipe)}-lora-{outtype}.gguf"
        eos_tokens = eos_tokens_of(run)
        ollama_base = self.options.ollama_base if self.options.to == "ollama" else None
        manifest = self._manifest(quantization=outtype)
        with export_folder(self.target, manifest, self.emit, size) as folder:
            write_gguf_lora(
                folder / file,
                run.recipe.name or run.recipe.algorithm,
                config,
                tensors,
                shape,
                outtype,
            )
            if ollama_base is not None:
                self._write_modelfile(
                    folder,
                    ollama_base,
                    f"./{file}",
                    None,
                )
            _write_card(
                folder,
                gguf_lora_card(
                    run.recipe,
                    file,
                    outtype,
                    ollama_base,
                    eos_tokens,
                    self._rope(),
                ),
            )

    def model(
        self,
        show: Callable[[MergeReport], None],
        device: torch.device | None,
    ) -> None:
        """Writes the merged model as a GGUF file, for Ollama with a Modelfile."""
        run = self.run
        options = self.options
        outtype = self._outtype(BITS_PER_WEIGHT)
        quantizer = _find_quantizer(outtype, options.llama_cpp)
        existing = find_existing_merge(run, options.weights)
        weights = count_weights(run.base)
        size = estimate_gguf_size(weights, outtype)
        if existing is None:
            size = size + 2 * weights
        check_disk_space(self.target, size, f"the model in {outtype}")
        converter = _find_converter(run, options.llama_cpp, self.emit)
        file = f"{slug(run.recipe)}-{outtype}.gguf"
        eos_tokens = eos_tokens_of(run)
        manifest = self._manifest(
            quantization=outtype,
            weights=options.weights,
        )
        with export_folder(self.target, manifest, self.emit, size) as folder:
            if existing is not None:
                merged = existing
                message = f"{existing.folder} contains this adapter already merged, and is used"
                self.emit(LogMessage(message=message))
                show(existing.report)
            else:
                merged = merge(run.path, folder / "merged", options.weights, self.emit, show, device)
            self._convert(
                converter,
                quantizer,
                merged.folder,
                folder / file,
                outtype,
            )
            shutil.rmtree(folder / "merged", ignore_errors=True)
            if options.to == "ollama":
                self._write_modelfile(
                    folder,
                    f"./{file}",
                    None,
                    folder / file,
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
                    self._rope(),
                ),
            )

    def _convert(
        self,
        converter: Path,
        quantizer: llama_cpp.Quantizer | None,
        merged: Path,
        file: Path,
        outtype: str,
    ) -> None:
        """Converts a merged model; smaller types are quantized from a 16-bit file."""
        name = self.run.recipe.name or self.run.recipe.algorithm
        adds_bos = has_bos(self.run)
        is_native = outtype in NATIVE_OUTTYPES
        wide = file if is_native else file.with_name("wide.gguf")
        convert(
            converter,
            merged,
            wide,
            outtype if is_native else "bf16",
            name,
            adds_bos,
            self.emit,
        )
        if is_native:
            return
        assert quantizer is not None
        # frees disk space for the quantized file
        shutil.rmtree(file.with_name("merged"), ignore_errors=True)
        quantize(
            quantizer,
            wide,
            file,
            outtype,
            self.emit,
        )
        wide.unlink()

    def _outtype(self, supported: Mapping[str, object]) -> str:
        """Returns the type of the tensors. Raises UserError if this export does not support it."""
        outtype = (self.options.quantization or DEFAULT_OUTTYPE[self.options.kind]).lower()
        if outtype not in supported:
            names = ", ".join(supported)
            raise UserError(f"--quantization {outtype} is not supported by this export; supported: {names}")
        return outtype

    def _rope(self) -> FixedRope | None:
        return fixed_rope(load_config(self.run.base), self.run.rope_factors)

    def _manifest(self, **more: str) -> dict[str, Any]:
        """Returns the facts in `export.json`."""
        manifest: dict[str, Any] = {"made_by": f"lowrank_tune {__version__}", "to": self.options.to}
        if self.options.to == "ollama":
            manifest["ollama_format"] = self.options.ollama_format
        manifest["base"] = self.run.recipe.base.model.partition("@")[0]
        manifest["revision"] = self.run.facts.get("revision")
        manifest["adapter"] = self.run.fingerprint()
        return {**manifest, **more}

    def _write_modelfile(
        self,
        folder: Path,
        start: str,
        adapter: str | None,
        file: Path | None,
    ) -> None:
        text = modelfile_text(
            self.run,
            self.options.system,
            start,
            adapter,
            file,
            self.emit,
        )
        (folder / "Modelfile").write_text(text, encoding="utf-8")


def _find_converter(
    run: FinishedRun,
    llama_cpp_folder: Path | None,
    emit: Emit,
) -> Path:
    """Returns the folder of llama.cpp's converter. Raises UserError if it does not support the run's base."""
    converter = llama_cpp.converter_folder(llama_cpp_folder, emit)
    architectures = load_config(run.base).architectures or []
    if architectures and not llama_cpp.supports_architecture(converter, architectures):
        raise UserError(
            f"llama.cpp's converter does not support {architectures[0]}; `--to peft` copies the adapter as it is"
        )
    return converter


def _find_quantizer(outtype: str, llama_cpp_folder: Path | None) -> llama_cpp.Quantizer | None:
    """Returns llama.cpp's quantizer, if it is installed. Raises UserError if the type needs it and it is not."""
    quantizer = llama_cpp.find_quantizer(llama_cpp_folder)
    if outtype not in NATIVE_OUTTYPES and quantizer is None:
        raise UserError(
            f"{outtype} needs llama.cpp's quantizer, which is not installed. Pass the folder of a built llama.cpp with "
            "--llama-cpp, run `pip install llama-cpp-python` (it compiles for minutes), or use --quantization q8_0. "
            "`ollama create --quantize q4_K_M` quantizes a 16-bit export (--quantization f16)"
        )
    return quantizer


def _compare_base(
    run: FinishedRun,
    emit: Emit,
    device: torch.device | None,
) -> None:
    """Checks that the base is the one of the training, since an adapter is useless over another one. On another kind of
    device than in training its 4-bit weights cannot be compared, which is a warning. Raises UserError."""
    device = device or pick_device()
    trained_on = run.facts.get("device", device.type)
    if trained_on != device.type:
        emit(warning(f"the base was not compared with the one of the training: this is possible on {trained_on} only"))
        return
    check_base(
        run,
        load_base(
            run.base,
            load_tokenizer(run.base),
            device,
            rope_factors=run.rope_factors,
        ),
    )


def _write_card(folder: Path, text: str) -> None:
    (folder / "README.md").write_bytes(text.encode("utf-8", "replace"))
