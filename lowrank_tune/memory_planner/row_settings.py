"""The settings with which the longest rows fit a GPU."""

from __future__ import annotations

from lowrank_tune.config import RecipeConfig

CHUNK_TOKENS = 4096
"""Tokens of a chunk of the MLPs, at most: in larger ones the MLPs are the peak again."""


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


def num_mlp_chunks(length: int) -> int:
    """Returns the smallest power of two so that a chunk of a row has at most `CHUNK_TOKENS` tokens."""
    count = 1
    while length > count * CHUNK_TOKENS:
        count *= 2
    return count
