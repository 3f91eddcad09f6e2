"""A target, loaded: the base it was trained over, checked tensor by tensor, and the adapters on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lowrank_tune.assembly import check_adapter_lineage
from lowrank_tune.assembly.finished_run import FinishedRun, adapters_at, adapters_in, check_base, roles_of
from lowrank_tune.chat.chat_model import ChatModel
from lowrank_tune.chat.target import ChatTarget, resolve_target
from lowrank_tune.config import AdapterConfig, BaseConfig
from lowrank_tune.data import ChatTemplate
from lowrank_tune.errors import OutOfMemory, UserError
from lowrank_tune.events import Emit, LogMessage, Progress
from lowrank_tune.model.adapters import SavedAdapter, adapter_rope_factors, lora_config, read_adapter
from lowrank_tune.model.base import Base, load_base, load_config, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors, select_factors

TEMPLATE = "chat_template.jinja"


def load_chat_model(
    name: str,
    emit: Emit,
    bits: int | None = None,
    base: str | None = None,
    device: torch.device | None = None,
    max_new_tokens: int = 0,
) -> ChatModel:
    """RUN or MODEL, ready to speak. `bits` and `base` are for what does not say: a model, an adapter, a base that was
    moved. Where no run stores its rotary frequencies, an answer of `max_new_tokens` selects them.

    Raises UserError: no such thing, a reward model, a base that is gone or is not the one that was trained over.
    """
    target = resolve_target(name)
    saved = _adapters(target, emit)
    base_config = _base(target, saved, bits, base)
    emit(LogMessage(message=target.description if target.model else f"{target.description}; over {base_config.model}"))
    try:
        if target.run is not None:
            template_date = target.run.recipe.data.template_date
        else:
            template_date = None
        template = _template(base_config, target.adapter, template_date, emit)
        factors = _rope_factors(target, base_config, max_new_tokens)
        emit(Progress(description=f"loading {base_config.model}", done=0, total=1))
        loaded = load_base(base_config, template.tokenizer, device, rope_factors=factors)
        emit(Progress(description=f"loading {base_config.model}", done=1, total=1))
    except UserError as error:
        if target.model:
            raise
        raise UserError(f"{name}: its base cannot be loaded; --base names another place for it. {error}") from error
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"out of memory while {base_config.model} was loaded: {str(error).splitlines()[0]}"
        ) from error
    if target.run is not None:
        _check(target.run, loaded, emit)
    # Roles need an adapter, and a model alone has none: a fresh one that no stack holds is never heard.
    if saved:
        roles = roles_of(saved, loaded)
    else:
        roles = Roles(
            loaded,
            {"unheard": lora_config(AdapterConfig(r=1), loaded.model)},
            trainable=[],
            stacks={"policy": []},
        )
    emit(LogMessage(message=template.describe()))
    if loaded.rope is not None:
        emit(LogMessage(message=loaded.rope.describe()))
    positions = loaded.max_row_length or getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if target.run is not None:
        system = target.run.recipe.data.system_prompt
    else:
        system = None
    return ChatModel(
        roles,
        template,
        loaded.end_ids | template.end_ids,
        positions if isinstance(positions, int) else None,
        bool(saved),
        system,
    )


def _adapters(target: ChatTarget, emit: Emit) -> Mapping[str, SavedAdapter]:
    """The adapters that together are the tuned variant, lowest first."""
    if target.adapter is not None:
        return adapters_at(target.adapter, str(target.adapter))
    if target.run is None:
        return {}
    if target.checkpoint is None:
        return adapters_in(target.run)
    recipe = target.run.recipe
    frozen = {
        name: read_adapter(str(adapter_config.path), f"adapters.{name}.path")
        for name, adapter_config in recipe.adapters.items()
        if name not in (recipe.trained_adapter, *recipe.extra_adapters, "reward")
    }
    check_adapter_lineage(recipe, frozen, emit)
    return {**frozen, recipe.trained_adapter: read_adapter(str(target.checkpoint), str(target.checkpoint))}


def _base(
    target: ChatTarget,
    saved_adapters: Mapping[str, SavedAdapter],
    bits: int | None,
    base: str | None,
) -> BaseConfig:
    """Which base to load. Raises UserError."""
    if target.model is not None:
        if base is not None:
            raise UserError(f"--base: {target.model} is a model itself; --base is for runs and adapters")
        return BaseConfig(model=target.model, bits=16 if bits == 16 else 4)
    if target.run is not None:
        base_config = target.run.base
        if bits not in (None, base_config.bits):
            raise UserError(
                f"--bits: {target.run.path} was trained over {base_config.bits} bits, and over others it answers "
                "differently"
            )
        if base:
            return base_config.model_copy(update={"model": base})
        return base_config
    top = list(saved_adapters.values())[-1]
    if base is None and not top.base_name:
        raise UserError(f"{target.adapter} does not say over which base it was trained: name it with --base")
    revision = top.config.revision
    if revision and "@" not in str(top.base_name):
        pinned = f"{top.base_name}@{revision}"
    else:
        pinned = str(top.base_name)
    return BaseConfig(model=base or pinned, bits=16 if bits == 16 else 4)


def _rope_factors(target: ChatTarget, base_config: BaseConfig, max_new_tokens: int) -> RopeFactors:
    """The factors that it was trained with; where that is not known, those for an answer and at least one token before
    it."""
    if target.run is not None:
        return target.run.rope_factors
    if target.adapter is not None:
        trained = adapter_rope_factors(str(target.adapter))
    else:
        trained = None
    return trained or select_factors(load_config(base_config), max_new_tokens + 1)


def _template(base_config: BaseConfig, adapter: Path | None, template_date: str | None, emit: Emit) -> ChatTemplate:
    """The base's; or the one that came with an adapter from elsewhere, where that is another one."""
    template = ChatTemplate.from_tokenizer(tokenizer := load_tokenizer(base_config), template_date)
    if adapter is not None and (adapter / TEMPLATE).is_file():
        try:
            text = (adapter / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{adapter / TEMPLATE}: cannot be read: {error}") from error
        if text.strip() != template.chat_template.strip():
            tokenizer.chat_template = text
            emit(LogMessage(message=f"chat template: {adapter / TEMPLATE}, which differs from the base's"))
            return ChatTemplate.from_tokenizer(tokenizer)
    return template


def _check(run: FinishedRun, base: Base, emit: Emit) -> None:
    """Compares the base with the one that was trained over, where that can be. Raises UserError where it is another
    one."""
    if not run.facts.get("tensors"):
        emit(
            LogMessage(
                level="warning",
                message=f"{run.path} holds no hashes of its base: nothing tells whether this is the one",
            )
        )
    elif run.facts.get("device", base.device.type) != base.device.type:
        emit(
            LogMessage(
                level="warning",
                message=f"{run.path} was trained on {run.facts['device']}, and this is {base.device.type}: its 4-bit "
                f"base "
                "cannot be compared with the one that was trained over",
            )
        )
    else:
        check_base(run, base)
