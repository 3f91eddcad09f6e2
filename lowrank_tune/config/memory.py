"""Settings of memory: which may change within a run, and what to change if memory is not sufficient."""

from __future__ import annotations

from typing import Any

from lowrank_tune.config.schema import RecipeConfig

MEMORY_SETTINGS = (
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.gradient_checkpointing",
    "train.activation_offloading",
    "train.mlp_chunks",
    "train.logits_chunk",
    "train.torch_compile",
    "train.memory_budget_gib",
    "train.memory_check",
    "rollout.max_num_seqs",
    "rollout.sync_every",
    "rollout.cuda_graphs",
    "rollout.prefix_caching",
)
"""Settings that change memory and speed and never the gradient: a run that had not enough memory may continue with
other values."""

CHUNK_TOKENS = 4096
"""Tokens of a chunk of the MLPs, at most: in larger ones the MLPs are the peak again."""


def memory_settings(recipe: RecipeConfig) -> dict[str, Any]:
    """Returns the settings of memory of a recipe, by their paths."""
    sections = {"train": recipe.train, "rollout": recipe.rollout}
    values: dict[str, Any] = {}
    for path in MEMORY_SETTINGS:
        section, _, key = path.partition(".")
        values[path] = getattr(sections[section], key)
    return values


def suggestions(
    recipe: RecipeConfig,
    kind: str,
    tokens: int,
    on_gpu: bool,
) -> str:
    """Returns the settings to change after work that cannot be split had not enough memory: first those with which this
    run may continue, then those of a new run.

    `kind` is a field of `MemoryLimits` or any other word, and `tokens` the length of the work.
    """
    continued = _settings_of_same_run(
        recipe,
        kind,
        tokens,
        on_gpu,
    )
    new_run = f"a new run (--out) may have {' or '.join(_settings_of_new_run(recipe, kind, tokens, on_gpu))}"
    if continued:
        return f"the same command with {' '.join(continued)} continues; {new_run}"
    return new_run


def num_mlp_chunks(length: int) -> int:
    """Returns the smallest power of two so that a chunk of a row has at most `CHUNK_TOKENS` tokens."""
    count = 1
    while length > count * CHUNK_TOKENS:
        count *= 2
    return count


def _settings_of_same_run(
    recipe: RecipeConfig,
    kind: str,
    tokens: int,
    on_gpu: bool,
) -> list[str]:
    train = recipe.train
    settings = list[str]()
    if _is_update(kind):
        if train.gradient_checkpointing not in (True, "all", "auto"):
            settings.append("train.gradient_checkpointing=true")
        if on_gpu and not train.activation_offloading:
            settings.append("train.activation_offloading=true")
        chunks = num_mlp_chunks(tokens)
        if on_gpu and chunks > train.mlp_chunks and recipe.base.backend == "transformers":
            settings.append(f"train.mlp_chunks={chunks}")
        if kind != "update_tokens" and train.micro_batch_size != 1:
            settings.append("train.micro_batch_size=1")
    if train.memory_budget_gib is not None:
        settings.append("a larger train.memory_budget_gib")
    return settings


def _settings_of_new_run(
    recipe: RecipeConfig,
    kind: str,
    tokens: int,
    on_gpu: bool,
) -> list[str]:
    settings = list[str]()
    if recipe.base.bits == 16:
        settings.append("base.bits=4")
    if _is_update(kind) and on_gpu and recipe.train.optim == "adamw":
        settings.append("train.optim=paged_adamw_8bit")
    if recipe.is_online:
        settings.append(f"rollout.max_new_tokens={max(1, recipe.rollout.max_new_tokens // 2)}")
        settings.append(f"data.max_prompt_length={max(1, recipe.data.max_prompt_length // 2)}")
    elif kind == "cache_tokens":
        settings.append(f"evaluate.max_new_tokens={max(1, recipe.evaluate.max_new_tokens // 2)}")
    else:
        longest = min(recipe.data.max_length, tokens or recipe.data.max_length)
        settings.append(f"data.max_length={max(8, longest // 2)}")
    return settings


def _is_update(kind: str) -> bool:
    return kind not in ("forward_tokens", "cache_tokens")
