"""Settings about memory: which may change, which would do nothing, and what to change when it ran out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_tune.config.raw_settings import Finding, get_raw
from lowrank_tune.config.schema import RecipeConfig

MEMORY_SETTINGS = (
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.gradient_checkpointing",
    "train.activation_offloading",
    "train.memory_budget_gib",
    "train.memory_check",
    "rollout.max_num_seqs",
)
"""What changes memory and speed and never the gradient, so that a run that ran short can go on with less."""


def unused_settings(data: Any) -> Iterator[Finding]:
    """What is offloaded belongs to recomputed layers."""
    checkpointing = get_raw(data, "train", "gradient_checkpointing")
    if get_raw(data, "train", "activation_offloading") is True and (
        checkpointing == "none" or (checkpointing == 0 and isinstance(checkpointing, int))
    ):
        yield (
            ("train", "activation_offloading"),
            "does nothing without `train.gradient_checkpointing`: it moves what recomputed layers keep",
        )


def memory_settings(recipe: RecipeConfig) -> dict[str, Any]:
    """What decides over memory, as a recipe has it."""
    sections = {"train": recipe.train, "rollout": recipe.rollout}
    return {key: getattr(sections[key.partition(".")[0]], key.partition(".")[2]) for key in MEMORY_SETTINGS}


def suggestions(recipe: RecipeConfig, kind: str, tokens: int, on_gpu: bool) -> str:
    """What to type after memory ran out in a piece of work that cannot be split (`kind` as in `MemoryLimits`, or any
    other word), `tokens` its length. First what a run may change when it goes on, then what makes it another run."""
    same_run = list[str]()
    new_run = list[str]()
    train = recipe.train
    online = recipe.algorithm in ("grpo", "ppo")
    updates = kind not in ("forward_tokens", "cache_tokens")
    if updates and train.gradient_checkpointing not in (True, "all", "auto"):
        same_run.append("train.gradient_checkpointing=true")
    if updates and on_gpu and not train.activation_offloading:
        same_run.append("train.activation_offloading=true")
    if updates and kind != "update_tokens" and train.micro_batch_size != 1:
        same_run.append("train.micro_batch_size=1")
    if train.memory_budget_gib is not None:
        same_run.append("a larger train.memory_budget_gib")
    if recipe.base.bits == 16:
        new_run.append("base.bits=4")
    if updates and on_gpu and train.optim == "adamw":
        new_run.append("train.optim=paged_adamw_8bit")
    if online:
        new_run.append(f"rollout.max_new_tokens={max(1, recipe.rollout.max_new_tokens // 2)}")
        new_run.append(f"data.max_prompt_length={max(1, recipe.data.max_prompt_length // 2)}")
    elif kind == "cache_tokens":
        new_run.append(f"evaluate.max_new_tokens={max(1, recipe.evaluate.max_new_tokens // 2)}")
    else:
        new_run.append(f"data.max_length={max(8, min(recipe.data.max_length, tokens or recipe.data.max_length) // 2)}")
    if same_run:
        continuation = [f"the same command with {' '.join(same_run)} continues"]
    else:
        continuation = []
    return "; ".join([*continuation, f"a new run (--out) may have {' or '.join(new_run)}"])
