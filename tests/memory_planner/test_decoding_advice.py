"""The advice for a plan in which decoding does not fit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lowrank_tune.memory_planner.fit import _advice
from lowrank_tune.memory_planner.plan_report import GIB, Phase, Plan
from lowrank_tune.memory_planner.sizes import Sizes

NO_SEARCH: Any = None


def plan_with(vram_gib: int, **phases: float) -> Plan:
    names = {"rollout": "rollout", "answers": "held-out answers", "update": "update"}
    found = tuple(
        Phase(names[key], {"weights": GIB, "activations": int((size - 1) * GIB)}) for key, size in phases.items()
    )
    return Plan("", "grpo", "a model", 4, "cuda", 2, 2, Sizes(4, 512), found, vram_gib * GIB, max_micro_batch_size=1)


@pytest.mark.parametrize(
    ("phases", "settings"),
    [
        ({"rollout": 9, "answers": 2, "update": 3}, "rollout.max_new_tokens or data.max_prompt_length"),
        ({"rollout": 2, "answers": 9, "update": 3}, "evaluate.max_new_tokens or data.max_prompt_length"),
        # The update fits with a smaller micro-batch, and the rollout still does not.
        ({"rollout": 9, "answers": 2, "update": 12}, "rollout.max_new_tokens or data.max_prompt_length"),
        (
            {"rollout": 9, "answers": 9, "update": 3},
            "rollout.max_new_tokens or evaluate.max_new_tokens or data.max_prompt_length",
        ),
    ],
)
def test_decoding_that_does_not_fit_needs_shorter_sequences(phases: dict[str, float], settings: str) -> None:
    """A smaller micro-batch has no effect on it."""
    spec: Any = SimpleNamespace(recipe=None)
    found = _advice(spec, NO_SEARCH, plan_with(8, **phases))
    assert found == f"one sequence at a time does not fit: a smaller {settings}"


def test_a_smaller_micro_batch_is_advised_where_decoding_fits() -> None:
    spec: Any = SimpleNamespace(
        recipe=SimpleNamespace(train=SimpleNamespace(micro_batch_tokens=None), max_train_length=512)
    )
    assert _advice(spec, NO_SEARCH, plan_with(8, rollout=2, update=9)) == "fits with train.micro_batch_size=1"


def test_weights_that_do_not_fit_are_not_a_matter_of_decoding() -> None:
    recipe = SimpleNamespace(base=SimpleNamespace(bits=4))
    plan = replace(plan_with(1, rollout=9, update=3), max_micro_batch_size=0)
    assert _advice(SimpleNamespace(recipe=recipe), NO_SEARCH, plan).startswith("the weights alone need")  # type: ignore[arg-type]
