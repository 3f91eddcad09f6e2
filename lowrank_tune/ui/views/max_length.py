"""The plan of the longest row, or of rows of a given length: in a terminal, and as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence

from rich.text import Text

from lowrank_tune.memory_planner.max_length import RowPlan
from lowrank_tune.memory_planner.plan_report import GIB
from lowrank_tune.ui import escape_control_chars


def row_lines(
    row_plan: RowPlan,
    is_longest: bool,
    arguments: Sequence[str],
) -> Iterator[Text]:
    """Yields the lines below the plan: the longest row if `is_longest`, what limits it, the host memory, and the
    command that trains such rows. `arguments` are the recipe and its settings, as they were given."""
    plan = row_plan.plan
    if is_longest and plan.fits:
        yield Text(f"longest row: {row_plan.length:,} tokens, {_limit(row_plan)}", "bold green")
    elif is_longest:
        yield Text(f"no row fits, not even one of {row_plan.length:,} tokens", "bold red")
    if not plan.fits:
        return
    yield Text(f"host memory for the inputs of {plan.recomputed} layers, pinned: {row_plan.host_bytes / GIB:.1f} GiB")
    command = shlex.join(["lowrank-tune", "run", *arguments, *row_plan.settings])
    yield Text(escape_control_chars(command))


def _limit(row_plan: RowPlan) -> str:
    if row_plan.is_limited_by_base:
        return "the longest that the base was made for"
    phase = row_plan.plan.peak_phase
    where = f" ({phase.where})" if phase.where else ""
    return f"limited by memory, in {phase.name}{where}"


def row_json(row_plan: RowPlan, is_longest: bool) -> str:
    """Returns the plan as a JSON object in one line."""
    plan = row_plan.plan
    limited_by = None
    if is_longest:
        limited_by = "base" if row_plan.is_limited_by_base else "memory"
    return json.dumps(
        {
            "name": plan.name,
            "max_length": row_plan.length,
            "fits": plan.fits,
            "limited_by": limited_by,
            "base_max_length": row_plan.max_positions or None,
            "peak_phase": plan.peak_phase.name,
            "needed_gib": round(plan.needed / GIB, 3),
            "vram_gib": round(plan.vram / GIB, 3),
            "host_memory_gib": round(row_plan.host_bytes / GIB, 3),
            "settings": list(row_plan.settings),
        }
    )
