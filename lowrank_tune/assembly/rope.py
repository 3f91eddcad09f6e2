"""The rotary frequencies of a run, selected from its settings before its base is loaded (`model/rotary.py`).

The settings bound every row, and the same settings select the same frequencies when a run is continued. All stages of a
chain share one base and one selection: otherwise an adapter that was trained with one set of factors would be
frozen below stages that compute with the other. Where an adapter of another run was trained with the long factors, this
run uses them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowrank_tune.config import RecipeConfig
from lowrank_tune.errors import ConfigError, ConfigProblem
from lowrank_tune.events import Emit, LogMessage, warning
from lowrank_tune.model.adapters import adapter_rope_factors
from lowrank_tune.model.base import load_config
from lowrank_tune.model.rotary import FixedRope, RopeFactors, fixed_rope, select_factors


def select_rope(stages: Sequence[RecipeConfig], emit: Emit) -> FixedRope | None:
    """Returns the frequencies for these stages over one base; None if its RoPE type has only one set of them. Raises
    ConfigError for rows that are longer than RoPE type `dynamic` allows."""
    config = load_config(stages[0].base)
    longest = max(stages, key=lambda stage: stage.longest_row)
    rope = fixed_rope(config, select_factors(config, longest.longest_row))
    if rope is None:
        return None
    if rope.rope_type == "dynamic":
        _check_row_lengths(stages, config)
        emit(LogMessage(message=rope.describe()))
        return rope
    adapters = _adapter_factors(stages)
    if longest.longest_row == longest.max_train_length:
        setting = _length_setting(longest)
    else:
        setting = "evaluate.max_new_tokens"
    reason = f"by `{setting}` the longest row has {longest.longest_row:,} tokens"
    if rope.factors == "short" and "long" in adapters.values():
        rope = fixed_rope(config, "long")
        assert rope is not None, "the configuration is the same"
        reason = f"{next(path for path, factors in adapters.items() if factors == 'long')} was trained with them"
    emit(LogMessage(message=f"{rope.describe()} ({reason})"))
    for path, factors in adapters.items():
        if factors != rope.factors:
            used = f"and this run uses the {rope.factors} ones"
            emit(
                warning(f"the adapter in {path} was trained with the {factors} factors of RoPE type `longrope`, {used}")
            )
    return rope


def check_heldout_length(
    recipe: RecipeConfig,
    longest_prompt: int,
    rope: FixedRope,
) -> None:
    """Checks that no held-out prompt with its answer becomes longer than the frequencies are for. Raises
    ConfigError."""
    limit = rope.max_row_length
    new_tokens = recipe.evaluate.max_new_tokens
    if limit is None or longest_prompt + new_tokens <= limit:
        return
    room = limit - longest_prompt
    if room > 0:
        cure = f"set it to {room:,} or less"
    else:
        cure = "use shorter prompts in `evaluate.eval_dataset`"
    if rope.rope_type == "longrope":
        key = _length_setting(recipe)
        cure += f", or set `{key}` so that rows may have more than {limit:,} tokens, which selects the long factors"
    message = (
        f"{new_tokens:,} tokens after a held-out prompt of {longest_prompt:,} make a row of more than {limit:,}, the "
        f"longest that the frequencies of RoPE type `{rope.rope_type}` are for in this run: {cure}"
    )
    raise ConfigError([ConfigProblem(message, "evaluate.max_new_tokens")])


def long_row_problem(recipe: RecipeConfig, config: Any) -> ConfigProblem | None:
    """Returns the problem of the setting that allows longer rows than RoPE type `dynamic` is for, or None."""
    rope = fixed_rope(config, "short")
    if rope is None or rope.rope_type != "dynamic" or recipe.max_train_length <= rope.original_length:
        return None
    key = _length_setting(recipe)
    if key == "rollout.max_new_tokens":
        prompts = " and `data.max_prompt_length` allow"
    else:
        prompts = " allows"
    message = (
        f"it{prompts} rows of {recipe.max_train_length:,} tokens, and the base's RoPE type `dynamic` changes the "
        f"frequencies of all rows of a call that holds one of more than {rope.original_length:,} "
        f"(`max_position_embeddings`): allow at most {rope.original_length:,}"
    )
    return ConfigProblem(message, key)


def _check_row_lengths(stages: Sequence[RecipeConfig], config: Any) -> None:
    """Raises ConfigError if a stage allows rows that are too long for RoPE type `dynamic`; all problems at once."""
    problems = []
    for stage in stages:
        problem = long_row_problem(stage, config)
        if problem is None:
            continue
        if len(stages) > 1:
            problem = replace(problem, key=f"stages.{stage.name}.{problem.key}")
        problems.append(problem)
    if problems:
        raise ConfigError(problems)


def _length_setting(recipe: RecipeConfig) -> str:
    """Returns the key of the setting that limits the length of training rows."""
    if recipe.is_online:
        return "rollout.max_new_tokens"
    return "data.max_length"


def _adapter_factors(stages: Sequence[RecipeConfig]) -> dict[str, RopeFactors]:
    """Returns the factors that each loaded adapter was trained with, by its path; only of folders that name them."""
    factors_by_path = {}
    for stage in stages:
        for adapter in stage.adapters.values():
            if not adapter.path:
                continue
            factors = adapter_rope_factors(adapter.path)
            if factors is not None:
                factors_by_path[adapter.path] = factors
    return factors_by_path
