"""How often a run repeats its phases."""

from __future__ import annotations

from lowrank_tune.config import RecipeConfig
from lowrank_tune.memory_planner.run_length import DEFAULT_BATCH, RunLength, Span
from lowrank_tune.memory_planner.step_costs import REFERENCE, UPDATE, VALIDATION

DEFAULT_EVALUATIONS = 10
"""Evaluations of a run whose recipe does not set their interval (`training/stage.py`)."""


def tokens_of_phase(
    name: str,
    recipe: RecipeConfig,
    length: RunLength,
) -> Span:
    """Returns the tokens that pass through a phase in the whole run."""
    if name == UPDATE:
        return length.tokens.times(update_passes(recipe))
    if name == REFERENCE:
        # Once for each pair, not in each epoch.
        return length.tokens.times(1 / max(1.0, length.epochs))
    if name == VALIDATION:
        share = _validation_share(recipe)
        return length.tokens.times(share / max(1.0, length.epochs) * num_evaluations(recipe, length))
    return length.tokens


def num_evaluations(recipe: RecipeConfig, length: RunLength) -> float:
    """Returns how often a run evaluates its policy."""
    interval = recipe.evaluate.eval_steps or max(1.0, length.steps // DEFAULT_EVALUATIONS)
    return max(1.0, length.steps // interval)


def num_heldout_rounds(recipe: RecipeConfig, length: RunLength) -> float:
    """Returns how often held-out questions are answered: before and after the run, and at each evaluation if the
    answers select the best step."""
    if recipe.metric_for_best_model == "accuracy":
        return 2 + num_evaluations(recipe, length)
    return 2.0


def tokens_per_update(recipe: RecipeConfig, micro_tokens: int) -> float:
    """Returns the tokens of an optimizer step with rows of the maximum length, at least those of a micro-batch."""
    train = recipe.train
    length = recipe.max_train_length
    if recipe.is_online:
        rows = train.prompts_per_step * recipe.rollout.num_generations
        steps = recipe.ppo.num_mini_batches if recipe.algorithm == "ppo" else 1
        return max(micro_tokens, rows * length / steps)
    if train.tokens_per_step is not None:
        return max(micro_tokens, train.tokens_per_step)
    rows = train.global_batch_size or DEFAULT_BATCH
    return max(micro_tokens, rows * length * (2 if recipe.uses_pairs else 1))


def update_passes(recipe: RecipeConfig) -> int:
    """Returns how often the update reads each completion."""
    if recipe.algorithm == "grpo":
        return recipe.grpo.num_iterations
    if recipe.algorithm == "ppo":
        return recipe.ppo.num_ppo_epochs
    return 1


def _validation_share(recipe: RecipeConfig) -> float:
    """Returns the tokens of the validation rows relative to those of an epoch, 0 where rows of their own have an
    unknown number."""
    data = recipe.data
    if recipe.is_online or data.validation or data.eval_rows:
        return 0.0
    return data.eval_fraction / (1 - data.eval_fraction)
