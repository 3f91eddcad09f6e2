"""Recipe -> data, base, roles, algorithm: the only place where the floors are wired together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowrank_tune import settings
from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.sft import SFT
from lowrank_tune.data import Order, Prepared, Prompt, Template, collate, load, prompts
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Note, Progress
from lowrank_tune.model.adapters import lora_config, read_adapter
from lowrank_tune.model.base import Base, load_base, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Algorithm, Batch

ALGORITHMS: dict[str, Callable[[Kit], Algorithm]] = {"sft": SFT}


@dataclass(frozen=True)
class Built:
    """All that one run needs, loaded."""

    base: Base
    roles: Roles
    template: Template
    data: Prepared
    heldout: list[Prompt]
    algorithm: Algorithm
    steps: int

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.base.end_ids | self.template.end_ids

    def reference_in_words(self) -> str:
        below = [name.removeprefix("lt_") for name in self.roles.stacks["reference"]]
        return f"the base with the frozen adapter {' + '.join(below)}" if below else "the base, adapters off"


def build(recipe: settings.Recipe, emit: Emit, device: torch.device | None = None) -> Built:
    """Loads what is cheap to check first: adapters' folders, tokenizer, data, and only then the base. Raises UserError."""
    adapters = {name: read_adapter(wanted.path, f"adapters.{name}.path") for name, wanted in recipe.adapters.items() if wanted.path}
    template = Template.of(load_tokenizer(recipe.base))
    emit(Note(message=template.describe()))
    data = load(recipe.data, template, recipe.seed, emit)
    for line in data.report.lines():
        emit(Note(message=line, level="warning" if "; dropped " in line else "info"))
    wanted = recipe.evaluate
    heldout = prompts(wanted.heldout, wanted.prompts, recipe.seed, recipe.data.system) if wanted.heldout else []
    heldout = [prompt for prompt in heldout if template.spoils(prompt.messages) is None]
    if wanted.heldout and not heldout:
        raise UserError(f"evaluate.heldout: {wanted.heldout.dataset} has no usable row")
    if heldout and all(prompt.gold is None for prompt in heldout):
        raise UserError("evaluate.heldout: none of its rows has a gold answer; name its column in `gold` or `columns`")
    emit(Progress(what=f"loading {recipe.base.model}", done=0, total=1))
    base = load_base(recipe.base, template.tokenizer, device)
    emit(Progress(what=f"loading {recipe.base.model}", done=1, total=1))
    lower = [name for name in recipe.adapters if name != "policy"]
    fresh = {name: lora_config(wanted, base.model) for name, wanted in recipe.adapters.items() if name not in adapters}
    configs = {name: adapters[name].config if name in adapters else fresh[name] for name in (*lower, "policy")}
    roles = Roles(base, configs, trainable=["policy"], stacks={"policy": [*lower, "policy"], "reference": lower},
                  checkpointing=recipe.train.gradient_checkpointing, seed=recipe.seed)  # fmt: skip
    for name, saved in adapters.items():
        roles.load_adapter_tensors(name, saved.tensors, f"adapters.{name}.path: {saved.folder}")
        if saved.base_name not in (None, recipe.base.model):
            message = f"the adapter in {saved.folder} says it was made for {saved.base_name}, not {recipe.base.model}"
            emit(Note(level="warning", message=message))
    order = Order(data.train.lengths, data.train.source_of, [source.weight for source in recipe.data.train], recipe.train, recipe.seed)

    def rows(step: int) -> Batch:
        return collate([data.train[row] for row in order.rows(step)], template.pad_id)

    algorithm = ALGORITHMS[recipe.algorithm](Kit(roles, rows))
    steps = recipe.train.steps or order.steps_of(recipe.train.epochs or 1.0)
    return Built(base, roles, template, data, heldout, algorithm, steps)
