"""The settings with which the longest rows fit a GPU."""

from __future__ import annotations

from lowrank_tune.config import RecipeConfig
from lowrank_tune.config.memory import num_mlp_chunks


def long_row_settings(recipe: RecipeConfig, length: int) -> list[str]:
    """Returns the settings, as arguments of a command, for rows of `length` tokens in micro-batches of 1: all layers
    recomputed, their inputs in host memory, and MLPs in chunks. Where completions are drawn they get longer, and the
    prompts do not."""
    row = f"data.max_length={length}"
    if recipe.is_online:
        row = f"rollout.max_new_tokens={length - recipe.data.max_prompt_length}"
    settings = [
        row,
        "train.micro_batch_size=1",
        "train.gradient_checkpointing=all",
        "train.activation_offloading=true",
    ]
    num_chunks = num_mlp_chunks(length)
    if num_chunks > 1 or recipe.train.mlp_chunks > 1:
        settings.append(f"train.mlp_chunks={num_chunks}")
    return settings
