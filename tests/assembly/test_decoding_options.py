"""`rollout.sync_every`, `rollout.cuda_graphs` and `rollout.prefix_caching` of a recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_tune.assembly.model import decoding_options
from lowrank_tune.config import RecipeConfig, load_any
from lowrank_tune.model.decoding_options import DecodingOptions


@pytest.mark.parametrize(
    ("overrides", "device", "options", "warns"),
    [
        ((), "cuda", DecodingOptions(8, True), False),
        (("rollout.cuda_graphs=false", "rollout.sync_every=3"), "cuda", DecodingOptions(3, False), False),
        (("rollout.cuda_graphs=true",), "cuda", DecodingOptions(8, True), False),
        ((), "cpu", DecodingOptions(8, True), False),
        (("rollout.cuda_graphs=true",), "cpu", DecodingOptions(8, True), True),
        (("rollout.prefix_caching=true",), "cuda", DecodingOptions(prefix_caching=True), False),
        (("rollout.prefix_caching=true",), "cpu", DecodingOptions(), True),
    ],
)
def test_options_of_a_recipe(overrides: tuple[str, ...], device: str, options: DecodingOptions, warns: bool) -> None:
    recipe = load_any("tiny-grpo", *overrides)
    assert isinstance(recipe, RecipeConfig)
    events: list[Any] = []
    assert decoding_options(recipe, torch.device(device), events.append) == options
    assert [event.level for event in events] == ["warning"] * warns
