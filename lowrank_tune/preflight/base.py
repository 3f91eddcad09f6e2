"""The base, built from its configuration alone, and what a recipe requires of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_tune.assembly.rope import long_row_problem
from lowrank_tune.config import BaseConfig
from lowrank_tune.config.base import Finding
from lowrank_tune.errors import UserError
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.model.base import (
    check_quantization,
    load_config,
    model_on_meta,
)
from lowrank_tune.model.optimizers import check_optimizer
from lowrank_tune.model.router_loss import routers_of
from lowrank_tune.preflight.findings import findings_of
from lowrank_tune.preflight.stages import PlannedStage


def meta_model(base: BaseConfig) -> Any:
    """Returns the base without weights. Raises UserError as `load_base` does."""
    config = load_config(base)
    check_quantization(config, base)
    return model_on_meta(base, config)


def row_length_findings(stage: PlannedStage, model: Any) -> Iterator[Finding]:
    """Yields the setting that allows longer rows than the base's rotary frequencies support."""
    problem = long_row_problem(stage.recipe, model.config)
    if problem is not None:
        yield tuple(problem.key.split(".")), problem.message


def router_findings(
    stage: PlannedStage,
    model: Any,
) -> Iterator[Finding]:
    """Yields the weight of a load-balancing loss that the base does not have."""
    if not stage.recipe.train.router_aux_loss_coef:
        return
    try:
        routers_of(model)
    except UserError as error:
        yield from findings_of(error, ("train", "router_aux_loss_coef"))


def optimizer_findings(stage: PlannedStage, on_gpu: bool) -> Iterator[Finding]:
    """Yields an optimizer that this device does not support."""
    try:
        check_optimizer(stage.recipe.train, "cuda" if on_gpu else "cpu")
    except UserError as error:
        yield from findings_of(error, ("train", "optim"))


def target_findings(stage: PlannedStage, model: Any) -> Iterator[Finding]:
    """Yields the target modules of adapters that the base does not have."""
    recipe = stage.recipe
    for name in (recipe.trained_adapter, *recipe.extra_adapters):
        adapter = recipe.adapters.get(name)
        if adapter is None or adapter.path is not None:
            continue
        try:
            lora_config(adapter, model)
        except UserError as error:
            for path, message in findings_of(error, ("adapters",)):
                if path == ("adapters",):
                    path = ("adapters", name, "target_modules")
                yield path, message.removeprefix("target_modules: ")
