"""What a plan states about the base in the other precision is the plan of the recipe with it."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest

from lowrank_tune.config import load_any
from lowrank_tune.memory_planner import Plan
from lowrank_tune.memory_planner.other_bits import with_other_bits
from lowrank_tune.memory_planner.plan_report import GIB, OtherBits
from lowrank_tune.memory_planner.planner import plan_of
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.ui.views.plan import lines
from lowrank_tune.ui.views.plan_json import plan_to_dict

SMALL = "base.model=Qwen/Qwen2.5-0.5B-Instruct"


@cache
def planned(name: str, *overrides: str, vram: int = 24 * GIB, device: str = "cuda") -> tuple[SimulationSpec, Plan]:
    (spec,) = simulation_specs(load_any(name, *overrides), device)
    return spec, plan_of(spec, vram, name)


def other_of(name: str, *overrides: str, vram: int = 24 * GIB) -> OtherBits:
    found = with_other_bits(*planned(name, *overrides, vram=vram)).other_bits
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "bits", "vram"),
    [
        pytest.param("qwen2.5-3b-sft", 4, 24, marks=pytest.mark.slow),
        pytest.param("qwen2.5-3b-dpo", 16, 0, marks=pytest.mark.slow),
        pytest.param("qwen2.5-3b-grpo", 4, 24, marks=pytest.mark.slow),
    ],
)
def test_other_bits_are_planned_as_with_the_setting(name: str, bits: int, vram: int) -> None:
    found = other_of(name, f"base.bits={bits}", SMALL, vram=vram * GIB)
    _, expected = planned(name, f"base.bits={20 - bits}", SMALL, vram=vram * GIB)
    assert found.bits == 20 - bits and found.fits
    assert found.needed == pytest.approx(expected.needed, rel=0.02)


@pytest.mark.slow
def test_fewer_sequences_are_decoded_at_once_where_16_bits_leave_less_memory() -> None:
    found = other_of("llama-3.1-8b-grpo")
    assert found.fits and 20 * GIB < found.needed <= 24 * GIB
    assert not other_of("llama-3.1-8b-grpo", vram=16 * GIB).fits


def test_other_bits_do_not_change_the_plan() -> None:
    spec, plan = planned("qwen2.5-3b-sft", SMALL)
    assert replace(with_other_bits(spec, plan), other_bits=None) == plan


def test_a_cpu_has_no_comparison() -> None:
    """There the base is in fp32, or packed and unpacked in each product: neither is chosen for its memory."""
    assert with_other_bits(*planned("tiny-sft", device="cpu")).other_bits is None


def test_a_base_that_is_published_in_4_bits_has_no_comparison() -> None:
    spec, plan = planned("qwen2.5-3b-sft", SMALL)
    config = copy.deepcopy(spec.config)
    config.quantization_config = {"load_in_4bit": True}
    assert with_other_bits(replace(spec, config=config), plan).other_bits is None


@pytest.mark.parametrize(
    ("fits", "vram", "line"),
    [
        (True, 24 * GIB, "with base.bits=16: 12.50 GiB, fits"),
        (False, 8 * GIB, "with base.bits=16: 12.50 GiB, does not fit"),
        (True, 0, "with base.bits=16: 12.50 GiB"),
    ],
)
def test_other_bits_are_one_line_and_one_object(fits: bool, vram: int, line: str) -> None:
    plan = replace(planned("qwen2.5-3b-sft", SMALL)[1], vram=vram)
    other = OtherBits(16, round(12.5 * GIB), fits)
    assert [str(one) for one in lines(plan) if "base.bits" in str(one)] == []
    assert [str(one) for one in lines(replace(plan, other_bits=other)) if "base.bits" in str(one)] == [line]
    assert plan_to_dict(plan, None)["other_bits"] is None
    found = plan_to_dict(replace(plan, other_bits=other), None)["other_bits"]
    assert found == {"bits": 16, "needed_bytes": round(12.5 * GIB), "fits": fits}
