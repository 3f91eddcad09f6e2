"""A memory plan in a terminal: a table of phases, what binds, and whether it fits."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.memory_planner.plan_report import (
    CUDA_CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    PURPOSES,
    SPLITTABLE_PHASES,
    Plan,
)
from lowrank_tune.ui import escape_control_chars

SHORT = {"optimizer": "optim.", "gradients": "grads", "activations": "activ.", "KV cache": "KV"}
"""Heads of columns, so that the table has room in 80 columns."""
SMALL = GIB // 10  # below it figures are in MiB


def show(plan: Plan, console: Console) -> None:
    """The whole plan of one stage."""
    for heading in headline(plan):
        console.print(Text(heading, "bold"))
    console.print(_table(plan))
    for line in lines(plan):
        console.print(line)


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


def lines(plan: Plan) -> list[Text]:
    """What binds, whether it fits, what would fit, and what to type."""
    binding = plan.peak_phase
    texts = [Text(f"most is held in: {binding.name}" + (f" ({binding.where})" if binding.where else ""))]
    if not plan.vram:
        return [*texts, Text(f"tensors: {plan.peak / GIB:.2f} GiB")]
    verdict = "fits" if plan.fits else "does not fit"
    texts.append(
        Text(
            f"{verdict}: {plan.needed / GIB:.2f} of {plan.vram / GIB:.2f} GiB (tensors {plan.peak / GIB:.2f}, CUDA "
            f"itself "
            f"{CUDA_CONTEXT_BYTES / GIB:.2f}, lost {FRAGMENTATION:.0%})",
            "green" if plan.fits else "bold red",
        )
    )
    if plan.fits and plan.needed > plan.vram:
        texts.append(
            Text(
                f"{binding.name} goes through in smaller pieces" if binding.name in SPLITTABLE_PHASES else binding.name
            )
        )
    if plan.max_micro_batch_size is not None and plan.fits_length is not None:
        texts.append(
            Text(
                f"room for a micro-batch of {plan.max_micro_batch_size}, or for rows of {plan.fits_length:,} tokens, "
                f"{plan.sizes.units} at once"
            )
        )
    if plan.advice:
        texts.append(Text(plan.advice, "yellow"))
    return texts + [Text(note, "dim") for note in plan.notes]


def _recomputed(plan: Plan) -> str:
    if plan.recomputed == plan.layers:
        return "all layers are recomputed"
    return f"{plan.recomputed} of {plan.layers} layers are recomputed" if plan.recomputed else "no layer is recomputed"


def _figure(size: int, divisor: int) -> str:
    return f"{size / divisor:.2f}" if size else ""
