"""Merges the adapter of a run into its base: W + s B A for every module that the adapter changes, in fp32 on the CPU,
shard by shard, cast once to bf16.

The adapter was trained over the *dequantized* base, so it is merged into those weights by default. `original` uses the
published weights, which are closer to the base model and further from the trained one. (PEFT's own merge into 4-bit
weights rounds most of the adapter away.) The result is read back and compared with the trained model before the folder
gets its name.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_tune.assembly.finished_run import (
    FinishedRun,
    adapters_in,
    check_base,
    load_finished_run,
    roles_of,
)
from lowrank_tune.checkpoint import atomic_folder, clean_stale
from lowrank_tune.data import ChatTemplate
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import Emit, Progress
from lowrank_tune.export.combine_lora import LoraAdapter, lora_adapters_of
from lowrank_tune.export.merge_check import (
    MergeReport,
    RecordedOutputs,
    compare_models,
    make_probes,
    readback_device,
    record_outputs,
)
from lowrank_tune.export.model_card import merged_model_card
from lowrank_tune.export.model_files import generation_config, serialize_tokenizer
from lowrank_tune.export.output_folder import check_disk_space
from lowrank_tune.full_disk import EXPORT_CURE, raise_if_full
from lowrank_tune.json_files import read_json_object
from lowrank_tune.model.base import (
    Base,
    count_weights,
    load_base,
    load_tokenizer,
    pick_device,
    stored_tensors,
)
from lowrank_tune.model.rotary import FixedRope

BaseWeights = Literal["dequantized", "original"]
WeightSource = Callable[[str], Tensor]
"""Returns a weight of the base by name."""
TensorShapes = Mapping[str, tuple[torch.Size, bool]]
"""Name -> shape, and whether it is a floating-point tensor."""
SHARD = 4 << 30
"""Bytes."""


@dataclass(frozen=True)
class MergedModel:
    """Folder of a merged model, and its comparison with the trained model."""

    folder: Path
    report: MergeReport


def merge(
    run: Path,
    out: Path | None,
    base_weights: BaseWeights,
    emit: Emit,
    show: Callable[[MergeReport], None],
    device: torch.device | None = None,
    shard: int = SHARD,
) -> MergedModel:
    """Merges the adapter of a run into its base. `show` is called with the comparison, also if it fails.

    Raises UserError if the run cannot be merged, TrainingError if the merged model differs from the trained one; then
    no folder is left.
    """
    finished = load_finished_run(run)
    target = out or _merge_folder(finished, base_weights)
    if os.path.lexists(target):
        raise UserError(f"{target} exists; give another folder with --out")
    weights = count_weights(finished.base)
    check_disk_space(target, 2 * weights, "the merged model")
    readback = readback_device(weights, finished.base, device or pick_device(), emit)
    job = _load_merge_job(finished, base_weights, device, emit)
    clean_stale(target.parent, target.name)
    with atomic_folder(target, overwrite=False, needed=2 * weights, cure=EXPORT_CURE) as folder:
        try:
            write_weights(
                folder,
                job.shapes,
                job.source,
                job.adapters,
                emit,
                shard,
            )
        except SafetensorError as error:
            raise_if_full(str(error))
            raise TrainingError(f"cannot write {target}: {error}") from error
        for name, data in job.config_files.items():
            (folder / name).parent.mkdir(
                parents=True,
                exist_ok=True,
            )
            (folder / name).write_bytes(data)
        # releases the weights of the base before the merged model is loaded
        del job.source
        report = compare_models(
            folder,
            job.recorded,
            job.eos_token_ids,
            readback,
            emit,
            finished.rope_factors,
        )
        show(report)
        problems = report.faults(base_weights == "dequantized")
        if problems:
            raise TrainingError(
                f"the merged model differs from the trained one and was not kept: {'; '.join(problems)}"
            )
        _write_report(folder, job, base_weights, report)
    return MergedModel(target, report)


@dataclass
class _MergeJob:
    """The loaded base and adapters, and the outputs of the trained model."""

    run: FinishedRun
    shapes: TensorShapes
    source: WeightSource
    adapters: list[LoraAdapter]
    config_files: dict[str, bytes]
    recorded: RecordedOutputs
    eos_token_ids: frozenset[int]
    rope: FixedRope | None


def _load_merge_job(
    run: FinishedRun,
    base_weights: BaseWeights,
    device: torch.device | None,
    emit: Emit,
) -> _MergeJob:
    """Loads base and adapters, and records the outputs of the trained model. Raises UserError."""
    template = ChatTemplate.from_config(load_tokenizer(run.base), run.recipe.data)
    saved = adapters_in(run)
    base = load_base(
        run.base,
        template.tokenizer,
        device,
        rope_factors=run.rope_factors,
    )
    check_base(run, base)
    if base_weights == "original" and run.recipe.base.bits == 4:
        source = original_weights(run, base)
    else:
        source = dequantize(base)
    roles = roles_of(saved, base)
    adapters = lora_adapters_of(roles)
    eos_token_ids = base.end_ids | template.end_ids
    probes = make_probes(
        run.recipe,
        template,
        emit,
        base.max_row_length,
    )
    recorded = record_outputs(roles, probes, eos_token_ids, emit)
    roles.unload_adapters()
    return _MergeJob(
        run,
        merged_tensor_shapes(base),
        source,
        adapters,
        _config_files(base, template, eos_token_ids),
        recorded,
        eos_token_ids,
        base.rope,
    )


def _write_report(
    folder: Path,
    job: _MergeJob,
    base_weights: BaseWeights,
    report: MergeReport,
) -> None:
    """Writes the model card and `merge.json`, and makes all files as readable as the card."""
    card = folder / "README.md"
    text = merged_model_card(
        job.run.recipe,
        base_weights,
        report.table(),
        job.rope,
    )
    card.write_bytes(text.encode("utf-8", "replace"))
    facts = {
        "version": 1,
        "base": base_weights,
        "adapter": job.run.fingerprint(),
        **asdict(report),
    }
    (folder / "merge.json").write_text(json.dumps(facts, indent=2))
    for file in folder.rglob("*"):
        # safetensors creates files that only their owner can read
        if file.is_file():
            shutil.copymode(card, file)


def _merge_folder(run: FinishedRun, base_weights: BaseWeights) -> Path:
    """Returns the default folder of a merge."""
    if base_weights == "dequantized":
        return run.path / "merged"
    return run.path / "merged-original"


def find_existing_merge(run: FinishedRun, base_weights: BaseWeights) -> MergedModel | None:
    """Returns the merged model of an earlier `merge` in the run, None if it is missing or has another adapter."""
    folder = _merge_folder(run, base_weights)
    facts = read_json_object(folder / "merge.json")
    if facts.get("base") != base_weights or facts.get("adapter") != run.fingerprint():
        return None
    try:
        figures = {field.name: facts[field.name] for field in fields(MergeReport)}
    except KeyError:
        return None
    return MergedModel(folder, MergeReport(**figures))


def merged_tensor_shapes(base: Base) -> dict[str, tuple[torch.Size, bool]]:
    """Returns name and shape of every tensor of the merged model, a tied head once, and whether it is
    floating-point."""
    state = base.model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in base.model.named_buffers() if name in state]
    shapes: dict[str, tuple[torch.Size, bool]] = {}
    for name, tensor in [*base.model.named_parameters(), *buffers]:
        quant_state = getattr(tensor, "quant_state", None)
        if quant_state is None:
            shapes[name] = (tensor.shape, tensor.is_floating_point())
        else:
            shapes[name] = (torch.Size(quant_state.shape), True)
    return shapes


def dequantize(base: Base) -> WeightSource:
    """Returns the weights that the adapter was trained over, as the 4-bit kernels dequantize them."""
    tensors = dict([*base.model.named_parameters(), *base.model.named_buffers()])

    def weight(name: str) -> Tensor:
        tensor = tensors[name]
        quant_state = getattr(tensor, "quant_state", None)
        plain: Tensor = tensor.detach()
        if quant_state is not None:
            plain = dequantize_4bit(plain, quant_state)
        return plain.cpu()

    return weight


def original_weights(run: FinishedRun, base: Base) -> WeightSource:
    """Returns the published weights. Raises UserError if they have other names or exist in 4 bits only."""
    stored = stored_tensors(run.base)
    shapes = merged_tensor_shapes(base)
    missing = sorted(shapes.keys() - stored.keys())
    if missing:
        raise UserError(
            f"{run.base.model} stores its weights under other names than the model has ({missing[0]} is missing), "
            "which `--weights original` does not support; use `--weights dequantized`"
        )

    def weight(name: str) -> Tensor:
        with safe_open(stored[name].file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(stored[name].name)
        shape, _ = shapes[name]
        if tensor.shape != shape:
            raise UserError(
                f"{run.base.model} contains {name} in 4 bits only, so there is no original; use `--weights dequantized`"
            )
        return tensor

    return weight


def write_weights(
    folder: Path,
    shapes: TensorShapes,
    source: WeightSource,
    adapters: list[LoraAdapter],
    emit: Emit,
    shard: int = SHARD,
) -> None:
    """Writes the merged weights to files of at most `shard` bytes (or one tensor), with an index for several files."""
    deltas = [adapter.pairs() for adapter in adapters]
    changed = {f"{name}.weight" for pairs in deltas for name in pairs}
    unknown = changed - shapes.keys()
    assert not unknown, f"the adapter changes {sorted(unknown)}, which the model does not contain"
    shards = list(_shards(shapes, shard))
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = _shard_name(number, len(shards))
        tensors = {}
        for name in names:
            weight = source(name)
            _, is_float = shapes[name]
            tensors[name] = merged_weight(name, weight, deltas) if is_float else weight
            file_of[name] = file
            emit(
                Progress(
                    description="merging, tensor by tensor",
                    done=len(file_of),
                    total=len(shapes),
                )
            )
        save_file(
            tensors,
            folder / file,
            metadata={"format": "pt"},
        )
    if len(shards) > 1:
        total_size = sum(2 * shape.numel() for shape, _ in shapes.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def merged_weight(
    name: str,
    weight: Tensor,
    deltas: list[dict[str, tuple[Tensor, Tensor]]],
) -> Tensor:
    """Returns W + sum of s B A in fp32, cast once to bf16. W is (out, in), A (r, in), s B (out, r)."""
    module = name.removesuffix(".weight")
    merged = weight.float()
    for pairs in deltas:
        if module in pairs:
            a, scaled_b = pairs[module]
            merged = torch.addmm(merged, scaled_b, a)
    return merged.to(torch.bfloat16).contiguous()


def _shard_name(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _shards(shapes: TensorShapes, max_bytes: int) -> Iterator[list[str]]:
    """Yields the names of the tensors of each file, in order."""
    names: list[str] = []
    size = 0
    for name, (shape, _) in shapes.items():
        tensor_size = 2 * shape.numel()
        if names and size + tensor_size > max_bytes:
            yield names
            names = []
            size = 0
        names.append(name)
        size += tensor_size
    yield names


def _config_files(
    base: Base,
    template: ChatTemplate,
    eos_token_ids: frozenset[int],
) -> dict[str, bytes]:
    """Returns the unquantized configuration, the generation config with every stop token, and the tokenizer with its
    chat template, by file name."""
    files = serialize_tokenizer(template.tokenizer, template.chat_template)
    generation = generation_config(base, eos_token_ids, template.pad_id)
    files["config.json"] = json.dumps(unquantized_config(base.model), indent=2).encode()
    files["generation_config.json"] = json.dumps(generation, indent=2).encode()
    return files


def unquantized_config(model: Any) -> dict[str, Any]:
    """Returns the model's `config.json` in bf16 without quantization and without the folder that it was loaded from."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = True
    raw = config.to_diff_dict()
    for key in ("_name_or_path", "quantization_config", "torch_dtype"):
        raw.pop(key, None)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return {
        **raw,
        "tie_word_embeddings": is_tied,
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
