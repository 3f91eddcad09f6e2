"""Plans of a base in float16, as on a GPU without bfloat16, and in float32."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_tune.config import load_any
from lowrank_tune.memory_planner import plan
from lowrank_tune.memory_planner.plan_report import Plan

pytestmark = pytest.mark.slow


def planned(dtype: str, preset: str = "tiny-grpo") -> Plan:
    (found,) = plan(load_any(preset, f"base.dtype={dtype}", "train.torch_compile=false"), 24.0)
    return found


def sizes(found: Plan) -> dict[str, Any]:
    return {phase.name: phase.bytes for phase in found.phases}


def test_float16_needs_the_memory_of_bfloat16() -> None:
    assert sizes(planned("float16")) == sizes(planned("bfloat16")) == sizes(planned("auto"))


def test_float32_needs_more() -> None:
    half, full = planned("bfloat16", "tiny-sft").peak_phase, planned("float32", "tiny-sft").peak_phase
    assert full.total > 1.3 * half.total
    assert full.bytes["adapters"] == half.bytes["adapters"]
