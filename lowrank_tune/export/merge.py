"""A run's adapter merged into its base: W + s B A for every module that it changes, in fp32 on the CPU, shard by shard,
cast once to bf16.

What was trained is the adapter over the *dequantised* base, so that is what it is merged into by default; `original`
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

from lowrank_tune.checkpoint import telling
from lowrank_tune.data import Template
from lowrank_tune.errors import RunFailed, UserError
from lowrank_tune.events import Emit, Progress
from lowrank_tune.export.card import merged_card
from lowrank_tune.export.finished import Finished, adapters_in, check_base, finished_run, parts_of, roles_of
from lowrank_tune.export.fold import Part
from lowrank_tune.export.folder import files_of_tokenizer, generation_config
from lowrank_tune.export.place import check_room, tidy
from lowrank_tune.export.proof import Proof, hear, place_for, probes, prove
from lowrank_tune.model.base import Base, count_weights, load_base, load_tokenizer, pick_device, weight_files

Kind = Literal["dequantized", "original"]
SHARD = 4 << 30  # bytes


@dataclass(frozen=True)
class Merged:
    """Where the merged model is, and how it compares with what was trained."""

    folder: Path
    proof: Proof


def merge(
    run: Path,
    out: Path | None,
    kind: Kind,
    emit: Emit,
    show: Callable[[Proof], None],
    device: torch.device | None = None,
    shard: int = SHARD,
) -> Merged:
    """Merges what a run left. `show` hears the comparison, good or bad.

    Raises UserError where it cannot be done, RunFailed where what came out is not what was trained; then nothing is
    left.
    """
    found = finished_run(run)
    target = out or found.path / ("merged" if kind == "dequantized" else "merged-original")
    if os.path.lexists(target):
        raise UserError(f"{target} exists; give another folder with --out")
    weights = count_weights(found.base)
    check_room(target, 2 * weights, "the merged model")
    place = place_for(weights, device or pick_device(), emit)
    template = Template.of(load_tokenizer(found.base))
    saved = adapters_in(found)
    base = load_base(found.base, template.tokenizer, device)
    check_base(found, base)
    source = originals(found, base) if kind == "original" and found.recipe.base.bits == 4 else dequantised(base)
    roles = roles_of(saved, base)
    parts = parts_of(roles)
    ends = base.end_ids | template.end_ids
    asked = probes(found.recipe, template, emit)
    heard = hear(roles, asked, ends, emit)
    roles.release()
    with telling(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        tidy(target)
        fresh = target.with_name(f".tmp-{target.name}-{token_hex(4)}")
        try:
            fresh.mkdir()
            write_weights(fresh, layout(base), source, parts, emit, shard)
            _write_rest(fresh, found, base, template, ends)
            device = base.device
            del base, roles, source
            proof = prove(fresh, heard, ends, place, emit)
            show(proof)
            if faults := proof.faults(kind == "dequantized"):
                raise RunFailed(
                    f"the merged model is not what was trained, and nothing is left of it: {'; '.join(faults)}"
                )
            _write(fresh / "README.md", merged_card(found.recipe, kind, proof.table()).encode("utf-8", "replace"))
            facts = {"version": 1, "base": kind, "adapter": found.fingerprint(), **proof.to_dict()}
            _write(fresh / "merge.json", json.dumps(facts, indent=2).encode())
            for file in fresh.iterdir():
                shutil.copymode(fresh / "README.md", file)  # safetensors makes files that only their owner reads
                _sync(file)
            os.replace(fresh, target)
        except SafetensorError as error:
            raise RunFailed(f"cannot write {target}: {error}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return Merged(target, proof)


def merged_before(found: Finished, kind: Kind) -> Merged | None:
    """The merged model that an earlier `merge` left in the run, where it holds the adapter that is there now."""
    folder = found.path / ("merged" if kind == "dequantized" else "merged-original")
    try:
        facts = json.loads((folder / "merge.json").read_bytes())
        if (facts["base"], facts["adapter"]) != (kind, found.fingerprint()):
            return None
        return Merged(folder, Proof(**{field.name: facts[field.name] for field in fields(Proof)}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def layout(base: Base) -> dict[str, tuple[torch.Size, bool]]:
    """Name and shape of every tensor of the merged model, a tied head once, and whether it is a floating-point one."""
    state = base.model.state_dict().keys()
    found: dict[str, tuple[torch.Size, bool]] = {}
    for name, tensor in (
        *base.model.named_parameters(),
        *((name, buffer) for name, buffer in base.model.named_buffers() if name in state),
    ):
        quantised = getattr(tensor, "quant_state", None)
        found[name] = (
            (tensor.shape, tensor.is_floating_point()) if quantised is None else (torch.Size(quantised.shape), True)
        )
    return found


def dequantised(base: Base) -> Callable[[str], Tensor]:
    """The weights that were trained over, by name, as the 4-bit kernels see them."""
    tensors = dict([*base.model.named_parameters(), *base.model.named_buffers()])

    def weight(name: str) -> Tensor:
        tensor = tensors[name].detach()
        state = getattr(tensors[name], "quant_state", None)
        plain: Tensor = tensor if state is None else dequantize_4bit(tensor, state)
        return plain.cpu()

    return weight


def originals(found: Finished, base: Base) -> Callable[[str], Tensor]:
    """The weights as they were published, by name. Raises UserError where they lie under other names, or in 4 bits
    only."""
    files, shapes = weight_files(found.base), layout(base)
    strange = sorted(shapes.keys() - files.keys())
    if strange:
        raise UserError(
            f"{found.base.model} stores its weights under other names than the model has ({strange[0]} is missing), "
            f"which "
            "`--base original` does not know; `--base dequantized` does"
        )

    def weight(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        if tensor.shape != shapes[name][0]:
            raise UserError(
                f"{found.base.model} holds {name} in 4 bits only, so there is no original; `--base dequantized` "
                f"takes what it has"
            )
        return tensor

    return weight


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[torch.Size, bool]],
    source: Callable[[str], Tensor],
    parts: list[Part],
    emit: Emit,
    shard: int = SHARD,
) -> None:
    """The merged weights in files of at most `shard` bytes (or one tensor), with an index where they are several."""
    deltas = [part.pairs() for part in parts]
    unknown = {f"{name}.weight" for pairs in deltas for name in pairs} - shapes.keys()
    assert not unknown, f"the adapter changes {sorted(unknown)}, which the model has not"
    plan = list(_shards(shapes, shard))
    names = (
        ["model.safetensors"]
        if len(plan) == 1
        else [f"model-{n:05d}-of-{len(plan):05d}.safetensors" for n in range(1, len(plan) + 1)]
    )
    done, total = 0, len(shapes)
    for file, members in zip(names, plan, strict=True):
        tensors = {}
        for name in members:
            tensors[name] = merged_weight(name, source(name), deltas) if shapes[name][1] else source(name)
            done += 1
            emit(Progress(what="merging, tensor by tensor", done=done, total=total))
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
    found = weight.float()
    for pairs in deltas:
        if (pair := pairs.get(name.removesuffix(".weight"))) is not None:
            found = torch.addmm(found, pair[1], pair[0])
    return found.to(torch.bfloat16).contiguous()


def _shards(shapes: Mapping[str, tuple[torch.Size, bool]], most: int) -> Iterator[list[str]]:
    members, size = list[str](), 0
    for name, (shape, _) in shapes.items():
        if members and size + 2 * shape.numel() > most:
            yield members
            members, size = [], 0
        members.append(name)
        size += 2 * shape.numel()
    yield members


def _write_rest(folder: Path, found: Finished, base: Base, template: Template, ends: frozenset[int]) -> None:
    """Configuration without quantisation, generation config with every end token, tokenizer with its chat template."""
    files = files_of_tokenizer(template.tokenizer, template.jinja)
    files["config.json"] = json.dumps(plain_config(base.model), indent=2).encode()
    files["generation_config.json"] = json.dumps(generation_config(base, ends, template.pad_id), indent=2).encode()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _write(folder / name, data)


def plain_config(model: Any) -> dict[str, Any]:
    """The model's `config.json` in bf16, unquantised, with the head tied where it is. It does not say where it was
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
