"""Loading of a chat target: its base, compared tensor by tensor with the trained one, and its adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowrank_tune.assembly import check_adapter_lineage
from lowrank_tune.assembly.finished_run import FinishedRun, adapters_at, adapters_in, check_base, roles_of
from lowrank_tune.chat.chat_model import ChatModel
from lowrank_tune.chat.target import ChatTarget, resolve_target
from lowrank_tune.config import BaseConfig
from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.templates.template_kwargs import NO_KWARGS, TemplateKwargs
from lowrank_tune.errors import OutOfMemory, UserError
from lowrank_tune.events import Emit, LogMessage, loading_progress, warning
from lowrank_tune.model.adapters import SavedAdapter, adapter_rope_factors, read_adapter
from lowrank_tune.model.base import Base, load_base, load_config, load_tokenizer
from lowrank_tune.model.rotary import RopeFactors, select_factors

TEMPLATE = "chat_template.jinja"


def load_chat_model(
    name: str,
    emit: Emit,
    bits: int | None = None,
    base: str | None = None,
    device: torch.device | None = None,
    max_new_tokens: int = 0,
    template_kwargs: TemplateKwargs = NO_KWARGS,
) -> ChatModel:
    """Loads a run, a checkpoint, an adapter or a model.

    `bits` and `base` set what the target does not: for a model, an adapter, or a base that was moved. Without a run the
    rotary factors are those of an answer of `max_new_tokens`. `template_kwargs` are variables of the chat template.

    Raises UserError if there is no such target, for a reward model, and for a base that is missing or is not the one
    that was trained over.
    """
    target = resolve_target(name)
    saved = _adapters(target, emit)
    base_config = _base(target, saved, bits, base)
    description = target.description
    if not target.model:
        description += f"; over {base_config.model}"
    emit(LogMessage(message=description))
    try:
        loaded, template = _load_base(
            target,
            base_config,
            device,
            max_new_tokens,
            template_kwargs,
            emit,
        )
    except UserError as error:
        if target.model:
            raise
        raise UserError(f"{name}: its base cannot be loaded; --base names another place for it. {error}") from error
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise OutOfMemory(f"out of memory while {base_config.model} was loaded: {reason}") from error
    if target.run is not None:
        _check(target.run, loaded, emit)
    emit(LogMessage(message=template.describe()))
    if loaded.rope is not None:
        emit(LogMessage(message=loaded.rope.describe()))
    return ChatModel(
        roles=roles_of(saved, loaded),
        template=template,
        stop_ids=loaded.end_ids | template.end_ids,
        positions=_context_length(loaded),
        tuned=bool(saved),
        system_prompt=target.run.recipe.data.system_prompt if target.run is not None else None,
    )


def _load_base(
    target: ChatTarget,
    base_config: BaseConfig,
    device: torch.device | None,
    max_new_tokens: int,
    template_kwargs: TemplateKwargs,
    emit: Emit,
) -> tuple[Base, ChatTemplate]:
    template = _template(
        target,
        base_config,
        template_kwargs,
        emit,
    )
    factors = _rope_factors(target, base_config, max_new_tokens)
    with loading_progress(base_config.model, emit):
        base = load_base(
            base_config,
            template.tokenizer,
            device,
            rope_factors=factors,
        )
    return base, template


def _context_length(base: Base) -> int | None:
    length = base.max_row_length
    if not length:
        length = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def _adapters(target: ChatTarget, emit: Emit) -> Mapping[str, SavedAdapter]:
    """Returns the adapters of the tuned variant, lowest first."""
    if target.adapter is not None:
        return adapters_at(target.adapter, str(target.adapter))
    if target.run is None:
        return {}
    if target.checkpoint is None:
        return adapters_in(target.run)
    recipe = target.run.recipe
    not_in_stack = (recipe.trained_adapter, *recipe.extra_adapters, "reward")
    frozen: dict[str, SavedAdapter] = {}
    for name, adapter_config in recipe.adapters.items():
        if name not in not_in_stack:
            frozen[name] = read_adapter(str(adapter_config.path), f"adapters.{name}.path")
    check_adapter_lineage(recipe, frozen, emit)
    return {**frozen, recipe.trained_adapter: read_adapter(str(target.checkpoint), str(target.checkpoint))}


def _base(
    target: ChatTarget,
    saved_adapters: Mapping[str, SavedAdapter],
    bits: int | None,
    base: str | None,
) -> BaseConfig:
    """Returns the base to load. Raises UserError if the options contradict the target."""
    if target.model is not None:
        if base is not None:
            raise UserError(f"--base: {target.model} is a model itself; --base is for runs and adapters")
        return BaseConfig(
            model=target.model,
            bits=16 if bits == 16 else 4,
        )
    if target.run is not None:
        base_config = target.run.base
        if bits not in (None, base_config.bits):
            raise UserError(
                f"--bits: {target.run.path} was trained over {base_config.bits} bits; other bits give other answers"
            )
        if base:
            return base_config.model_copy(update={"model": base})
        return base_config
    top = list(saved_adapters.values())[-1]
    if base is None and not top.base_name:
        raise UserError(f"{target.adapter} does not name the base that it was trained over: name it with --base")
    revision = top.config.revision
    pinned = str(top.base_name)
    if revision and "@" not in pinned:
        pinned = f"{pinned}@{revision}"
    return BaseConfig(
        model=base or pinned,
        bits=16 if bits == 16 else 4,
    )


def _rope_factors(
    target: ChatTarget,
    base_config: BaseConfig,
    max_new_tokens: int,
) -> RopeFactors:
    """Returns the rotary factors of the training, or else those for an answer and at least one token before it."""
    if target.run is not None:
        return target.run.rope_factors
    trained = None
    if target.adapter is not None:
        trained = adapter_rope_factors(str(target.adapter))
    return trained or select_factors(load_config(base_config), max_new_tokens + 1)


def _template(
    target: ChatTarget,
    base_config: BaseConfig,
    template_kwargs: TemplateKwargs,
    emit: Emit,
) -> ChatTemplate:
    """Returns the chat template of the base; or the one that came with an adapter from elsewhere, where that is another
    one. Variables in `template_kwargs` replace those of a run."""
    adapter = target.adapter
    date = None
    kwargs = template_kwargs
    if target.run is not None:
        date = target.run.recipe.data.template_date
        kwargs = {**target.run.recipe.data.chat_template_kwargs, **template_kwargs}
    tokenizer = load_tokenizer(base_config)
    if adapter is not None and (adapter / TEMPLATE).is_file():
        try:
            text = (adapter / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{adapter / TEMPLATE}: cannot be read: {error}") from error
        own = ChatTemplate.from_tokenizer(tokenizer, date)
        if text.strip() != own.chat_template.strip():
            tokenizer.chat_template = text
            date = None
            emit(LogMessage(message=f"chat template: {adapter / TEMPLATE}, which differs from the base's"))
    return ChatTemplate.from_tokenizer(
        tokenizer,
        date,
        kwargs=kwargs,
    )


def _check(
    run: FinishedRun,
    base: Base,
    emit: Emit,
) -> None:
    """Compares the base with the trained one, if that is possible. Raises UserError if they differ."""
    device = base.device.type
    if not run.facts.get("tensors"):
        emit(warning(f"{run.path} has no hashes of its base, so this base cannot be compared with the trained one"))
    elif run.facts.get("device", device) != device:
        emit(
            warning(
                f"{run.path} was trained on {run.facts['device']}, and this is {device}: its 4-bit base cannot be "
                "compared with the trained one"
            )
        )
    else:
        check_base(run, base)
