"""A memory plan in a terminal: a table of phases, what binds, and whether it fits."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.memory_planner.plan_report import (
    CUDA_CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    PURPOSES,
    Plan,
    needed,
)
from lowrank_tune.ui import escape_control_chars

SHORT = {"optimizer": "optim.", "gradients": "grads", "activations": "activ.", "KV cache": "KV"}
"""Heads of columns, so that the table has room in 80 columns."""
SMALL = GIB // 10  # below it figures are in MiB
SETTING = re.compile(r"(?<![\w.])(?=(?:adapters|data|evaluate|rollout|train)\.\w)")
"""Before a setting that each stage of a chain has for itself."""


def show(plan: Plan, console: Console, in_chain: bool = False) -> None:
    """The whole plan of a recipe, or of one stage of a chain."""
    for heading in headline(plan):
        console.print(Text(heading, "bold"))
    console.print(_table(plan))
    for line in lines(plan, in_chain):
        console.print(line)


def worst_stage_line(plans: Sequence[Plan]) -> Text:
    """The stage of a chain that needs most of the memory there is, and whether it fits."""
    worst = max(plans, key=lambda plan: (not plan.fits, plan.needed / (plan.vram or 1)))
    name = f"worst stage: {escape_control_chars(worst.name)}"
    if not worst.vram:
        return Text(f"{name}, {worst.needed / GIB:.2f} GiB", "bold")
    return Text(
        f"{name}, {worst.needed / GIB:.2f} of {worst.vram / GIB:.2f} GiB, {'fits' if worst.fits else 'does not fit'}",
        "bold green" if worst.fits else "bold red",
    )


def _table(plan: Plan) -> Table:
    unit, divisor = ("GiB", GIB) if plan.peak >= SMALL else ("MiB", 1 << 20)
    used = [purpose for purpose in PURPOSES if any(phase.bytes.get(purpose) for phase in plan.phases)]
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="dim")
    table.add_column(f"{unit} at its peak", no_wrap=True)
    for purpose in used:
        table.add_column(SHORT.get(purpose, purpose), justify="right", no_wrap=True)
    table.add_column("all", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for phase in plan.phases:
        binds = phase is plan.peak_phase
        style = ("green" if plan.fits else "bold red") if binds else ""
        cells = [_figure(phase.bytes.get(purpose, 0), divisor) for purpose in used]
        table.add_row(Text(phase.name), *cells, _figure(phase.total, divisor), "<" if binds else "", style=style)
    return table


def headline(plan: Plan) -> tuple[str, str]:
    """What is planned."""
    sizes = plan.sizes
    unit_name = ("pair" if sizes.rows_per_unit == 2 else "completion" if sizes.num_rollouts else "row") + (
        "s" if sizes.units > 1 else ""
    )
    return (
        escape_control_chars(f"{plan.name or plan.algorithm}: {plan.algorithm} of {plan.model}, {plan.bits} bits"),
        f"a micro-batch is {sizes.units} {unit_name} of {sizes.length:,} tokens; {_recomputed(plan)}",
    )


def lines(plan: Plan, in_chain: bool = False) -> list[Text]:
    """What binds, whether it fits, what would fit, and what to type; for a stage `stages.NAME.train...`."""
    binding = plan.peak_phase
    texts = [Text(f"most is held in: {binding.name}" + (f" ({binding.where})" if binding.where else ""))]
    if not plan.vram:
        return [*texts, Text(f"needs {plan.peak / GIB:.2f} GiB of this machine's memory for tensors")]
    verdict = "fits" if plan.fits else "does not fit"
    needed_gib = plan.needed / GIB
    vram_gib = plan.vram / GIB
    tensors_gib = plan.peak / GIB
    texts.append(
        Text(
            f"{verdict}: {needed_gib:.2f} of {vram_gib:.2f} GiB (tensors {tensors_gib:.2f}, CUDA itself "
            f"{CUDA_CONTEXT_BYTES / GIB:.2f}, lost {FRAGMENTATION:.0%})",
            "green" if plan.fits else "bold red",
        )
    )
    for phase in plan.split_phases if plan.fits else ():
        phase_gib = needed(phase.total, plan.device) / GIB
        texts.append(Text(f"{phase.name} runs in smaller pieces: at once it needs {phase_gib:.2f} GiB"))
    if plan.max_micro_batch_size is not None and plan.fits_length is not None:
        texts.append(
            Text(
                f"room for a micro-batch of {plan.max_micro_batch_size}, or for rows of {plan.fits_length:,} tokens, "
                f"{plan.sizes.units} at once"
            )
        )
    if plan.advice:
        texts.append(Text(SETTING.sub(f"stages.{plan.name}.", plan.advice) if in_chain else plan.advice, "yellow"))
    return texts + [Text(note, "dim") for note in plan.notes]


def _recomputed(plan: Plan) -> str:
    if plan.recomputed == plan.layers:
        return "all layers are recomputed"
    if plan.recomputed:
        return f"{plan.recomputed} of {plan.layers} layers are recomputed"
    return "no layer is recomputed"


def _figure(size: int, divisor: int) -> str:
    return f"{size / divisor:.2f}" if size else ""
