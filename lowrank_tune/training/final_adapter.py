"""The folder `final/`, which a user copies.

Its root is one adapter in PEFT's format that answers as the run did: the trained adapter combined with the frozen ones
below it (`train.final_adapters: combined`). Then the trained one alone is in the folder of its name, where later stages
and continued runs read it (`stack.json` marks this). With `separate` the root is the trained adapter alone, each frozen
one is in the folder of its name, and the model card shows how to load them together. PPO's value has a folder of its
own. Further files: model card, tokenizer with chat template, a generation config with every token that ends an answer,
and over a base of RoPE type `longrope` the set of its factors. No file names a folder of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.assembly import RunComponents
from lowrank_tune.checkpoint import Snapshot
from lowrank_tune.events import warning
from lowrank_tune.export.combine_lora import (
    LoraAdapter,
    as_lora_adapter,
    cannot_combine_reason,
    combine_adapters,
)
from lowrank_tune.export.model_card import Adapters, model_card
from lowrank_tune.export.model_files import generation_config, serialize_tokenizer, token_strings
from lowrank_tune.model.adapters import (
    CONFIG,
    ROPE,
    STACK,
    WEIGHTS,
)
from lowrank_tune.model.roles import ADAPTER_PREFIX
from lowrank_tune.model.text_model import serving_adapter
from lowrank_tune.training.stage import Stage


def final_folder(stage: Stage) -> Snapshot:
    """Returns all files of `final/` for a stage that has ended."""
    built = stage.built
    snapshot = Snapshot()
    adapters = _add_adapters(stage, snapshot)
    _add_tokenizer(stage, snapshot)
    rope = built.base.rope
    if rope is not None and rope.factors is not None:
        snapshot.documents[ROPE] = {
            "version": 1,
            "rope_type": rope.rope_type,
            "factors": rope.factors,
            "original_max_position_embeddings": rope.original_length,
        }
    if adapters.is_generative:
        config = generation_config(built.base, built.stop_ids, built.template.pad_id)
        snapshot.documents["generation_config.json"] = config
    eos_tokens = eos_token_strings(built)
    text = model_card(
        stage.recipe,
        stage.summary,
        built.base.revision,
        adapters,
        eos_tokens,
        rope,
    )
    snapshot.raw_files["README.md"] = text.encode("utf-8", "replace")
    return snapshot


def _add_adapters(stage: Stage, snapshot: Snapshot) -> Adapters:
    """Adds all trained adapters and the frozen ones below them. Returns their description for the model card."""
    roles = stage.built.roles
    top, *others = stage.built.trained
    names = [name.removeprefix(ADAPTER_PREFIX) for name in roles.stacks[top]]
    adapters = [as_lora_adapter(roles, name) for name in names]
    combined = _can_combine(stage, names, adapters)
    config, tensors = adapters[-1].config, adapters[-1].tensors
    if combined:
        config, tensors = combine_adapters(adapters)
    _add_adapter(stage, snapshot, "", config, tensors)
    if len(names) > 1:
        frozen = {name: stage.frozen_adapters[name] for name in names[:-1]}
        snapshot.documents[STACK] = {
            "version": 1,
            "stack": names,
            "frozen_adapters": frozen,
            "combined": combined,
        }
        separate = dict(zip(names[:-1], adapters[:-1], strict=True))
        if combined:
            separate = {top: adapters[-1]}
        for name, adapter in separate.items():
            _add_adapter(stage, snapshot, f"{name}/", adapter.config, adapter.tensors)
    for name in others:
        adapter = as_lora_adapter(roles, name)
        _add_adapter(stage, snapshot, f"{name}/", adapter.config, adapter.tensors)
    return Adapters(
        names,
        combined,
        config,
        is_generative="policy" in stage.built.trained,
        is_multimodal=stage.built.base.is_multimodal,
        dtype=_serving_dtype(stage),
    )


def _serving_dtype(stage: Stage) -> str:
    """Returns the dtype in which to load the base: that of the run, but bfloat16 for a run whose dtype follows from a
    CPU."""
    if stage.built.base.dtype == torch.float16:
        return "float16"
    return "float32" if stage.recipe.base.dtype == "float32" else "bfloat16"


def _can_combine(
    stage: Stage,
    names: list[str],
    adapters: list[LoraAdapter],
) -> bool:
    """Returns whether the root is the combined stack; a warning states why a stack cannot be combined."""
    if len(names) > 1 and stage.recipe.train.final_adapters != "combined":
        return False
    reason = cannot_combine_reason(adapters)
    if reason is not None and len(names) > 1:
        stage.emit(
            warning(f"the adapters {', '.join(names)} cannot be combined ({reason}): final/ contains them separately")
        )
    return reason is None


def _add_adapter(
    stage: Stage,
    snapshot: Snapshot,
    prefix: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Adds the files of an adapter, whose names begin with `prefix`. Modules have the names of the class that serves
    the base."""
    if stage.built.base.is_multimodal:
        config, tensors = serving_adapter(config, tensors)
    snapshot.documents[prefix + CONFIG] = dict(config)
    snapshot.tensors[prefix + WEIGHTS] = dict(tensors)


def _add_tokenizer(stage: Stage, snapshot: Snapshot) -> None:
    """Adds the tokenizer; a tokenizer that cannot be saved is a warning, since the adapter must be saved anyway."""
    try:
        snapshot.raw_files |= tokenizer_files(stage.built)
    except (OSError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        stage.emit(
            warning(
                f"final/ has no tokenizer: the base's cannot be saved ({type(error).__name__}: {error}); use the "
                "tokenizer of the base"
            )
        )


def tokenizer_files(built: RunComponents) -> dict[str, bytes]:
    """Returns the tokenizer's files with the chat template of the training, also if the base has no template."""
    return serialize_tokenizer(built.template.tokenizer, built.template.chat_template)


def eos_token_strings(built: RunComponents) -> list[str]:
    """Returns the stop tokens as strings."""
    return token_strings(built.template.tokenizer, sorted(built.stop_ids))
