"""The valid part of a recipe with invalid values, and the checks that run on it."""

from __future__ import annotations

from typing import Any

import pytest
from recipe_helpers import problems_of

from lowrank_tune.config import RecipeConfig
from lowrank_tune.config.base import InvalidSetting
from lowrank_tune.config.validate import partial_recipe, unused_settings

INVALID: dict[str, Any] = {
    "algorithm": "sftt",
    "adapters": {"low": 7, "policy": {"r": "eight", "lora_alpha": 8, "path": None}},
    "data": {"train": [{"split": "x"}, 3], "validation": "rows.jsonl"},
    "train": {"max_steps": "no", "warmup_steps": 5, "unknown": 1},
    "evaluate": 7,
}


def test_partial_recipe_contains_the_valid_values_and_the_defaults() -> None:
    recipe, problems = partial_recipe(INVALID)
    assert recipe.adapters["policy"].lora_alpha == 8 and recipe.adapters["policy"].path is None
    assert recipe.train.warmup_steps == 5 and recipe.train.learning_rate == 2e-4
    assert len(problems) == 9, problems


def test_partial_recipe_has_every_section_and_empty_required_texts() -> None:
    recipe, _ = partial_recipe(INVALID)
    assert recipe.algorithm == "" and [source.dataset for source in recipe.data.train] == ["", ""]
    assert len(recipe.data.validation) == 1 and list(recipe.adapters) == ["low", "policy"]
    assert partial_recipe({})[0].data.train == () == partial_recipe(None)[0].rewards


def test_reading_an_invalid_setting_raises() -> None:
    recipe, _ = partial_recipe(INVALID)
    for read in (lambda: recipe.train.max_steps, lambda: recipe.adapters["policy"].r):
        with pytest.raises(InvalidSetting):
            read()
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = recipe.train.no_such_name  # type: ignore[attr-defined]


def test_is_set_is_true_for_written_keys_and_false_for_null_and_defaults() -> None:
    recipe, _ = partial_recipe(INVALID)
    train, policy = recipe.train, recipe.adapters["policy"]
    assert train.is_set("max_steps") and train.is_set("warmup_steps") and recipe.is_set("evaluate")
    assert not train.is_set("learning_rate") and not policy.is_set("path") and not recipe.is_set("rewards")
    valid = RecipeConfig.model_validate(
        {"algorithm": "sft", "data": {"train": [{"dataset": "a", "weight": None}]}, "train": {"max_steps": 1}}
    )
    assert valid.train.is_set("max_steps") and not valid.data.train[0].is_set("weight")


def test_invalid_setting_ends_its_check_and_no_other() -> None:
    data = {
        "algorithm": "dpo",
        "data": {"train": [{"dataset": "a.jsonl", "format": "alpaca"}]},
        "train": {"max_steps": 1, "project": "x"},
        "dpo": {"loss_type": "robst", "label_smoothing": 0.2},
        "adapters": {"policy": {"lora_dropout": 0.1}},
    }
    assert sorted(line.partition(": ")[0] for line in problems_of(data)) == [
        "adapters.policy.lora_dropout",
        "data.train.0.format",
        "dpo.loss_type",
        "train.project",
    ]


def test_unused_settings_of_a_resolved_recipe_are_those_that_are_not_saved() -> None:
    data = {"algorithm": "sft", "data": {"train": [{"dataset": "a"}]}, "train": {"max_steps": 1}, "ppo": {"lam": 1.0}}
    assert ("ppo",) in dict(unused_settings(partial_recipe(data)[0]))
