"""A plan as JSON."""

from __future__ import annotations

from typing import Any

from lowrank_tune.memory_planner.plan_report import Plan
from lowrank_tune.memory_planner.run_time import RunTime
from lowrank_tune.ui.views.run_time import run_time_to_dict


def plan_to_dict(plan: Plan, run_time: RunTime | None) -> dict[str, Any]:
    """Returns the plan of one stage: bytes of each phase, whether it fits, and the run-time estimate."""
    phases = []
    for phase in plan.phases:
        phases.append(
            {
                "phase": phase.name,
                "bytes": dict(phase.bytes),
                "total": phase.total,
                "where": phase.where,
            }
        )
    return {
        "name": plan.name,
        "algorithm": plan.algorithm,
        "model": plan.model,
        "bits": plan.bits,
        "device": plan.device,
        "layers": plan.layers,
        "recomputed": plan.recomputed,
        "micro_batch": {
            "units": plan.sizes.units,
            "rows": plan.sizes.rows,
            "length": plan.sizes.length,
        },
        "phases": phases,
        "needed_bytes": plan.needed,
        "vram_bytes": plan.vram,
        "fits": plan.fits,
        "other_bits": _other_bits_to_dict(plan),
        "max_micro_batch_size": plan.max_micro_batch_size,
        "fits_length": plan.fits_length,
        "advice": plan.advice,
        "notes": list(plan.notes),
        "run_time": None if run_time is None else run_time_to_dict(run_time),
    }


def _other_bits_to_dict(plan: Plan) -> dict[str, Any] | None:
    other = plan.other_bits
    if other is None:
        return None
    return {
        "bits": other.bits,
        "needed_bytes": other.needed,
        "fits": other.fits,
    }
