"""The memory planner's word on each cell. It needs the whole kit, so it may be asked elsewhere and its answer carried as a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from card.base import SHAPES
from card.cells import Cell
from card.made import Adapter
from card.makers import ONLINE

NEEDS = ("pydantic", "datasets", "yaml")


def missing() -> list[str]:
    """What the planner needs and is not installed."""
    return [name for name in NEEDS if find_spec(name) is None]


def written(cells: Iterable[Cell], shape: str, cap_gb: float) -> str:
    """What `plans` reads: the planned peaks of tensors in GiB, and the phase that binds."""
    found, phases = {}, {}
    for cell in cells:
        plan = planned(cell, shape, cap_gb)
        found[cell.name], phases[cell.name] = plan.peak / 2**30, plan.binding.name
    return json.dumps({"shape": shape, "cap GB": cap_gb, "planned GiB": found, "binds": phases}, indent=2) + "\n"


def planned(cell: Cell, shape: str, cap_gb: float) -> Any:
    """The `Plan` of a cell on a card."""
    from lowrank_tune.plan import plan  # these need what a bare machine has not
    from lowrank_tune.recipe import Recipe

    return next(plan(Recipe.from_dict(recipe_of(cell, shape)), cap_gb * 1e9 / 2**30))


def recipe_of(cell: Cell, shape: str) -> dict[str, Any]:
    """The recipe that a cell stands for. Nobody reads its data."""
    online, size = cell.algorithm in ONLINE, cell.size
    train = {"steps": 4, "micro_batch_size": cell.micro, "gradient_checkpointing": cell.checkpointing, "activation_offloading": cell.offload,
             "optimizer": cell.optimizer}  # fmt: skip
    recipe: dict[str, Any] = {"algorithm": cell.algorithm, "base": {"model": SHAPES[shape]}, "train": train,
                              "data": {"train": [{"dataset": "rows.jsonl"}]}}  # fmt: skip
    trained = "reward" if cell.algorithm == "reward" else "policy"
    recipe["adapters"] = {trained: {"r": Adapter.r, "alpha": Adapter.alpha}}
    if online:
        train["prompts_per_step"] = cell.units // size.completions
        recipe["data"]["max_prompt_length"] = size.prompt
        recipe["rollout"] = {"num_generations": size.completions, "max_new_tokens": size.new}
        recipe["rewards"] = [{"use": "repetition"}]
    else:
        train["rows_per_step"] = cell.units
        recipe["data"] |= {"max_length": cell.length, "validation_share": 0.0}
        train["final"] = "last"
    if cell.algorithm == "grpo":
        recipe["grpo"] = {"dead_groups": "keep"}
    return recipe


def plans(shape: str, file: str | None) -> dict[str, float]:
    """Planned peaks in GiB by the cells' names; none without a file."""
    if file is None:
        return {}
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    if found["shape"] != shape:
        raise SystemExit(f"{file} holds plans for {found['shape']}, not for {shape}")
    return {str(name): float(gib) for name, gib in found["planned GiB"].items()}
