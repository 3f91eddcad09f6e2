"""The planned memory of each cell. The planner needs the whole kit, so plans may be made elsewhere and carried as a
file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_proof.base import SHAPES
from gpu_proof.cells import Cell
from gpu_proof.factories import GENERATIVE
from gpu_proof.synthetic import AdapterSettings

REQUIRED = ("pydantic", "datasets", "yaml")


def missing_packages() -> list[str]:
    """Return what the planner needs and is not installed."""
    return [name for name in REQUIRED if find_spec(name) is None]


def make_plans(cells: Iterable[tuple[str, Cell]], cap_gb: float) -> dict[str, Any]:
    """Return, by shape and cell, the planned peak of tensors in GiB and the phase that determines it."""
    shapes: dict[str, dict[str, Any]] = {}
    for shape, cell in cells:
        plan = plan_cell(cell, shape, cap_gb)
        entry = {"planned_gib": plan.peak / 2**30, "phase": plan.peak_phase.name}
        shapes.setdefault(shape, {})[cell.name] = entry
    return {"cap_gb": cap_gb, "shapes": shapes}


def plan_cell(cell: Cell, shape: str, cap_gb: float) -> Any:
    """Return the `Plan` of a cell on a GPU."""
    from lowrank_tune.config import Recipe
    from lowrank_tune.memory_planner import plan  # needs packages that such a machine may lack

    return next(plan(Recipe.from_dict(recipe_of(cell, shape)), cap_gb * 1e9 / 2**30))


def recipe_of(cell: Cell, shape: str) -> dict[str, Any]:
    """Return the recipe of a cell. Its data file is never read."""
    online, size = cell.algorithm in GENERATIVE, cell.size
    train: dict[str, Any] = {
        "max_steps": 4,
        "micro_batch_size": cell.micro,
        "gradient_checkpointing": cell.checkpointing,
        "activation_offloading": cell.offload,
        "optim": cell.optimizer,
        "torch_compile": cell.torch_compile,
    }
    role = "reward" if cell.algorithm == "reward" else "policy"
    recipe: dict[str, Any] = {
        "algorithm": cell.algorithm,
        "base": {"model": SHAPES[shape]},
        "train": train,
        "data": {"train": [{"dataset": "rows.jsonl"}]},
        "adapters": {role: {"r": AdapterSettings.r, "lora_alpha": AdapterSettings.lora_alpha}},
    }
    if online:
        train["prompts_per_step"] = cell.units // size.num_generations
        recipe["data"]["max_prompt_length"] = size.prompt
        recipe["rollout"] = {"num_generations": size.num_generations, "max_new_tokens": size.max_new_tokens}
        recipe["rewards"] = [{"name": "repetition"}]
    else:
        train["global_batch_size"] = cell.units
        recipe["data"] |= {"max_length": cell.length, "eval_fraction": 0.0}
        train["load_best_model_at_end"] = False
    if cell.algorithm == "grpo":
        recipe["grpo"] = {"zero_std_groups": "keep"}
    return recipe


def read_plans(path: Path | None, shape: str) -> dict[str, float]:
    """Return the planned peaks in GiB by the names of cells; none without a file, or where the file has none of this
    shape."""
    if path is None:
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["shapes"].get(shape, {})
    return {name: float(entry["planned_gib"]) for name, entry in entries.items()}
