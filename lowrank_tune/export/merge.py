"""A run's adapter merged into its base: W + s B A for every module that it changes, in fp32 on the CPU, shard by shard,
cast once to bf16.

What was trained is the adapter over the *dequantized* base, so that is what it is merged into by default; `original`
takes the weights as their author published them, which are nearer to the base model and further from what was trained.
(PEFT's own merge into 4-bit weights rounds the adapter away.) The result is read back and compared with what was
trained before it gets its name.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from secrets import token_hex
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
from lowrank_tune.checkpoint import as_user_error
from lowrank_tune.data import ChatTemplate
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import Emit, Progress
from lowrank_tune.export.combine_lora import LoraAdapter, lora_adapters_of
from lowrank_tune.export.merge_check import MergeReport, compare_models, make_probes, readback_device, record_outputs
from lowrank_tune.export.model_card import merged_model_card
from lowrank_tune.export.model_files import generation_config, serialize_tokenizer
from lowrank_tune.export.output_folder import check_disk_space, clean_stale
from lowrank_tune.model.base import Base, count_weights, load_base, load_tokenizer, pick_device, weight_files

BaseWeights = Literal["dequantized", "original"]
SHARD = 4 << 30  # bytes


@dataclass(frozen=True)
class MergedModel:
    """Where the merged model is, and how it compares with what was trained."""

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
    """Merges what a run left. `show` hears the comparison, good or bad.

    Raises UserError where it cannot be done, TrainingError where what came out is not what was trained; then nothing is
    left.
    """
    finished = load_finished_run(run)
    target = out or finished.path / ("merged" if base_weights == "dequantized" else "merged-original")
    if os.path.lexists(target):
        raise UserError(f"{target} exists; give another folder with --out")
    weights = count_weights(finished.base)
    check_disk_space(target, 2 * weights, "the merged model")
    readback = readback_device(weights, device or pick_device(), emit)
    template = ChatTemplate.from_tokenizer(load_tokenizer(finished.base), finished.recipe.data.template_date)
    saved = adapters_in(finished)
    base = load_base(finished.base, template.tokenizer, device, rope_factors=finished.rope_factors)
    check_base(finished, base)
    if base_weights == "original" and finished.recipe.base.bits == 4:
        source = original_weights(finished, base)
    else:
        source = dequantize(base)
    roles = roles_of(saved, base)
    adapters = lora_adapters_of(roles)
    eos_token_ids = base.end_ids | template.end_ids
    probes = make_probes(finished.recipe, template, emit, base.max_row_length)
    recorded = record_outputs(roles, probes, eos_token_ids, emit)
    roles.unload_adapters()
    with as_user_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(target)
        fresh = target.with_name(f".tmp-{target.name}-{token_hex(4)}")
        try:
            fresh.mkdir()
            write_weights(fresh, merged_tensor_shapes(base), source, adapters, emit, shard)
            _write_configs(fresh, finished, base, template, eos_token_ids)
            device = base.device
            rope = base.rope
            del base, roles, source
            report = compare_models(fresh, recorded, eos_token_ids, readback, emit, finished.rope_factors)
            show(report)
            if faults := report.faults(base_weights == "dequantized"):
                raise TrainingError(
                    f"the merged model is not what was trained, and nothing is left of it: {'; '.join(faults)}"
                )
            _write(
                fresh / "README.md",
                merged_model_card(finished.recipe, base_weights, report.table(), rope).encode("utf-8", "replace"),
            )
            facts = {"version": 1, "base": base_weights, "adapter": finished.fingerprint(), **report.to_dict()}
            _write(fresh / "merge.json", json.dumps(facts, indent=2).encode())
            for file in fresh.iterdir():
                shutil.copymode(fresh / "README.md", file)  # safetensors makes files that only their owner reads
                _sync(file)
            fresh.replace(target)
        except SafetensorError as error:
            raise TrainingError(f"cannot write {target}: {error}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return MergedModel(target, report)


def find_existing_merge(run: FinishedRun, base_weights: BaseWeights) -> MergedModel | None:
    """The merged model that an earlier `merge` left in the run, where it holds the adapter that is there now."""
    folder = run.path / ("merged" if base_weights == "dequantized" else "merged-original")
    try:
        facts = json.loads((folder / "merge.json").read_bytes())
        if (facts["base"], facts["adapter"]) != (base_weights, run.fingerprint()):
            return None
        return MergedModel(folder, MergeReport(**{field.name: facts[field.name] for field in fields(MergeReport)}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def merged_tensor_shapes(base: Base) -> dict[str, tuple[torch.Size, bool]]:
    """Name and shape of every tensor of the merged model, a tied head once, and whether it is a floating-point one."""
    state = base.model.state_dict().keys()
    shapes: dict[str, tuple[torch.Size, bool]] = {}
    for name, tensor in (
        *base.model.named_parameters(),
        *((name, buffer) for name, buffer in base.model.named_buffers() if name in state),
    ):
        quant_state = getattr(tensor, "quant_state", None)
        shapes[name] = (
            (tensor.shape, tensor.is_floating_point()) if quant_state is None else (torch.Size(quant_state.shape), True)
        )
    return shapes


def dequantize(base: Base) -> Callable[[str], Tensor]:
    """The weights that were trained over, by name, as the 4-bit kernels see them."""
    tensors = dict([*base.model.named_parameters(), *base.model.named_buffers()])

    def weight(name: str) -> Tensor:
        tensor = tensors[name].detach()
        state = getattr(tensors[name], "quant_state", None)
        plain: Tensor = tensor if state is None else dequantize_4bit(tensor, state)
        return plain.cpu()

    return weight


def original_weights(run: FinishedRun, base: Base) -> Callable[[str], Tensor]:
    """The weights as they were published, by name. Raises UserError where they lie under other names, or in 4 bits
    only."""
    files = weight_files(run.base)
    shapes = merged_tensor_shapes(base)
    missing = sorted(shapes.keys() - files.keys())
    if missing:
        raise UserError(
            f"{run.base.model} stores its weights under other names than the model has ({missing[0]} is missing), "
            "which `--weights original` does not support; use `--weights dequantized`"
        )

    def weight(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        if tensor.shape != shapes[name][0]:
            raise UserError(
                f"{run.base.model} holds {name} in 4 bits only, so there is no original; use `--weights dequantized`"
            )
        return tensor

    return weight


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[torch.Size, bool]],
    source: Callable[[str], Tensor],
    adapters: list[LoraAdapter],
    emit: Emit,
    shard: int = SHARD,
) -> None:
    """The merged weights in files of at most `shard` bytes (or one tensor), with an index where they are several."""
    deltas = [adapter.pairs() for adapter in adapters]
    unknown = {f"{name}.weight" for pairs in deltas for name in pairs} - shapes.keys()
    assert not unknown, f"the adapter changes {sorted(unknown)}, which the model has not"
    plan = list(_shards(shapes, shard))
    if len(plan) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{n:05d}-of-{len(plan):05d}.safetensors" for n in range(1, len(plan) + 1)]
    done = 0
    total = len(shapes)
    for file, members in zip(names, plan, strict=True):
        tensors = {}
        for name in members:
            tensors[name] = merged_weight(name, source(name), deltas) if shapes[name][1] else source(name)
            done += 1
            emit(Progress(description="merging, tensor by tensor", done=done, total=total))
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(plan) > 1:
        where = {name: file for file, members in zip(names, plan, strict=True) for name in members}
        size = sum(2 * shape.numel() for shape, _ in shapes.values())
        _write(
            folder / "model.safetensors.index.json",
            json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2).encode(),
        )


def merged_weight(name: str, weight: Tensor, deltas: list[dict[str, tuple[Tensor, Tensor]]]) -> Tensor:
    """W + sum of s B A in fp32, cast once to bf16. W is (out, in), A (r, in), s B (out, r)."""
    merged = weight.float()
    for pairs in deltas:
        if (pair := pairs.get(name.removesuffix(".weight"))) is not None:
            merged = torch.addmm(merged, pair[1], pair[0])
    return merged.to(torch.bfloat16).contiguous()


def _shards(shapes: Mapping[str, tuple[torch.Size, bool]], max_bytes: int) -> Iterator[list[str]]:
    members = list[str]()
    size = 0
    for name, (shape, _) in shapes.items():
        if members and size + 2 * shape.numel() > max_bytes:
            yield members
            members = []
            size = 0
        members.append(name)
        size += 2 * shape.numel()
    yield members


def _write_configs(
    folder: Path,
    run: FinishedRun,
    base: Base,
    template: ChatTemplate,
    eos_token_ids: frozenset[int],
) -> None:
    """Configuration without quantization, generation config with every end token, tokenizer with its chat template."""
    files = serialize_tokenizer(template.tokenizer, template.chat_template)
    files["config.json"] = json.dumps(unquantized_config(base.model), indent=2).encode()
    files["generation_config.json"] = json.dumps(
        generation_config(base, eos_token_ids, template.pad_id), indent=2
    ).encode()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _write(folder / name, data)


def unquantized_config(model: Any) -> dict[str, Any]:
    """The model's `config.json` in bf16, unquantized, with the head tied where it is. It does not say where it was
    loaded from."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = True
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    raw = {
        key: value
        for key, value in config.to_diff_dict().items()
        if key not in ("_name_or_path", "quantization_config", "torch_dtype")
    }
    return {
        **raw,
        "tie_word_embeddings": tied,
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _sync(path: Path) -> None:
    """To the disk itself, before the folder gets its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
