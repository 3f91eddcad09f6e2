"""`final/`, the folder that a user takes away.

At its root lies one adapter in PEFT's format that answers as the run did, whatever it was trained over: the trained
adapter, with the frozen ones below it folded into it (`train.final_adapters: combined`). Then the trained one alone
lies in a folder of its name, where later stages and continued runs read it (`stack.json` says so). With `separate` the
root is the trained one alone, each frozen one lies in a folder of its name, and the card says how to load them
together. PPO's value has a folder of its own. Beside them: model card, tokenizer with chat template, and a generation
config with every token that ends an answer; over a base of RoPE type `longrope` also the set of its factors. Nothing
here names the machine.
"""

from __future__ import annotations

from lowrank_tune.assembly import RunComponents
from lowrank_tune.checkpoint import Snapshot
from lowrank_tune.events import LogMessage
from lowrank_tune.export.combine_lora import LoraAdapter, as_lora_adapter, cannot_combine_reason, combine_adapters
from lowrank_tune.export.model_card import Adapters, model_card
from lowrank_tune.export.model_files import generation_config, serialize_tokenizer
from lowrank_tune.model.adapters import CONFIG, ROPE, STACK, WEIGHTS
from lowrank_tune.model.roles import ADAPTER_PREFIX
from lowrank_tune.training.stage import Stage


def final_folder(stage: Stage) -> Snapshot:
    """All files of `final/`, of a stage that has ended."""
    roles = stage.built.roles
    built = stage.built
    top, *others = built.trained
    names = [name.removeprefix(ADAPTER_PREFIX) for name in roles.stacks[top]]
    adapters = [as_lora_adapter(roles, name) for name in names]
    reason = None
    combined = len(names) == 1 or stage.recipe.train.final_adapters == "combined"
    if combined and (reason := cannot_combine_reason(adapters)) is not None:
        if len(names) > 1:
            message = f"the adapters {', '.join(names)} cannot be folded into one ({reason}): final/ holds them apart"
            stage.emit(LogMessage(level="warning", message=message))
        combined = False
    snapshot = Snapshot()
    if combined:
        root = combine_adapters(adapters)
    else:
        root = (dict(adapters[-1].config), dict(adapters[-1].tensors))
    snapshot.documents[CONFIG], snapshot.tensors[WEIGHTS] = root
    if len(names) > 1:
        frozen = {name: stage.frozen_adapters[name] for name in names[:-1]}
        snapshot.documents[STACK] = {"version": 1, "stack": names, "frozen_adapters": frozen, "combined": combined}
        for name, adapter in [(top, adapters[-1])] if combined else zip(names[:-1], adapters[:-1], strict=True):
            _add(snapshot, name, adapter)
    for name in others:
        _add(snapshot, name, as_lora_adapter(roles, name))
    try:
        snapshot.raw_files |= tokenizer_files(built)
    # what was trained must not be lost over this
    except (OSError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        message = (
            f"final/ has no tokenizer: the base's cannot save itself ({type(error).__name__}: {error}); use "
            f"the base's own"
        )
        stage.emit(LogMessage(level="warning", message=message))
    rope = built.base.rope
    if rope is not None and rope.factors is not None:
        snapshot.documents[ROPE] = {
            "version": 1,
            "rope_type": rope.rope_type,
            "factors": rope.factors,
            "original_max_position_embeddings": rope.original_length,
        }
    if "policy" in built.trained:
        snapshot.documents["generation_config.json"] = generation_config(
            built.base,
            built.stop_ids,
            built.template.pad_id,
        )
    info = Adapters(names, combined, root[0], is_generative="policy" in built.trained)
    text = model_card(stage.recipe, stage.summary, built.base.revision, info, eos_token_strings(built), rope)
    snapshot.raw_files["README.md"] = text.encode("utf-8", "replace")
    return snapshot


def _add(snapshot: Snapshot, name: str, adapter: LoraAdapter) -> None:
    snapshot.documents[f"{name}/{CONFIG}"] = dict(adapter.config)
    snapshot.tensors[f"{name}/{WEIGHTS}"] = dict(adapter.tensors)


def tokenizer_files(built: RunComponents) -> dict[str, bytes]:
    """The tokenizer's files with the chat template that was trained with, the kit's own where the base brought none."""
    return serialize_tokenizer(built.template.tokenizer, built.template.chat_template)


def eos_token_strings(built: RunComponents) -> list[str]:
    """The end tokens in letters."""
    return [str(built.template.tokenizer.convert_ids_to_tokens(number)) for number in sorted(built.stop_ids)]
