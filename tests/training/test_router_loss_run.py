"""Runs of a mixture of experts with the load-balancing loss of its routers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import CPU
from support_matrix import ALGORITHMS, FAMILIES, Case

import lowrank_tune
from lowrank_tune.config import load_any

CHANGES = ("train.max_steps=1", "train.micro_batch_size=4", "evaluate={}", "train.router_aux_loss_coef=0.01")
OF_ALGORITHM = {
    "grpo": ("train.prompts_per_step=2", "rollout.num_generations=4", "grpo.zero_std_groups=keep"),
    "ppo": ("train.prompts_per_step=2", "rollout.num_generations=4"),
}


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    yield Case(next(family for family in FAMILIES if family.model_type == "qwen3_moe"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_logs_the_loss_of_routers(case: Case, algorithm: str, tmp_path: Path) -> None:
    more = OF_ALGORITHM.get(algorithm, ("train.global_batch_size=4",))
    if algorithm in OF_ALGORITHM:
        more = (*more, "rollout.max_new_tokens=8")
    recipe = load_any(f"tiny-{algorithm}", f"base.model={case.folder}", *CHANGES, *more)
    lowrank_tune.run(recipe, out=tmp_path, ui="none", device=CPU)
    events: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (step,) = [event for event in events if event["event"] == "step_end"]
    # 2 of 4 experts are chosen: 2 if all are used alike, 4 if two always are.
    assert 1 < step["stats"]["router_aux_loss"] < 4
    messages = [event["message"] for event in events if event["event"] == "log_message"]
    assert sum("with `train.router_aux_loss_coef` rows are padded" in message for message in messages) == 1
    assert sum("the experts stay in 32 bits" in message for message in messages) == 1
