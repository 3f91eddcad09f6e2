"""A memory plan in a terminal: a table of phases, what binds, and whether it fits."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.plan.figures import CONTEXT, FRAGMENTATION, GIB, PURPOSES, Phase, Plan
from lowrank_tune.ui import inert


def show(plan: Plan, console: Console) -> None:
    """The whole plan of one stage."""
    console.print(Text(headline(plan), "bold"))
    used = [purpose for purpose in PURPOSES if any(phase.bytes.get(purpose) for phase in plan.phases)]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("GiB at its peak")
    for purpose in used:
        table.add_column(purpose, justify="right")
    table.add_column("total", justify="right")
    for phase in plan.phases:
        binds = phase is plan.binding
        style = ("green" if plan.fits else "bold red") if binds else ""
        cells = [_gib(phase.bytes.get(purpose, 0)) for purpose in used]
        table.add_row(Text(phase.name), *cells, Text(_gib(phase.total) + (" <" if binds else "  ")), style=style)
    console.print(table)
    for line in lines(plan):
        console.print(line)


def headline(plan: Plan) -> str:
    """What is planned."""
    sizes = plan.sizes
    what = "pairs" if sizes.together == 2 else "completions" if sizes.harvest else "rows"
    return inert(f"{plan.name or plan.algorithm}: {plan.algorithm} of {plan.model}, {plan.bits} bits, micro-batch {sizes.units} {what} "
                 f"of {sizes.length:,} tokens, {_recomputed(plan)}")  # fmt: skip


def lines(plan: Plan) -> list[Text]:
    """What binds, whether it fits, and what to type."""
    binding: Phase = plan.binding
    told = [Text(f"binds: {binding.name}" + (f" ({binding.where})" if binding.where else ""))]
    if plan.vram:
        verdict = "fits" if plan.fits else "does not fit"
        told.append(Text(f"{verdict}: {plan.needed / GIB:.2f} GiB of {plan.vram / GIB:.2f} (tensors {plan.peak / GIB:.2f}, CUDA "
                         f"{CONTEXT / GIB:.2f}, fragmentation {FRAGMENTATION:.0%})", "green" if plan.fits else "bold red"))  # fmt: skip
    else:
        told.append(Text(f"needs {plan.needed / GIB:.2f} GiB"))
    if plan.advice:
        told.append(Text(plan.advice, "yellow"))
    return told + [Text(note, "dim") for note in plan.notes]


def _recomputed(plan: Plan) -> str:
    if plan.recomputed == plan.layers:
        return "all layers recomputed"
    return f"{plan.recomputed} of {plan.layers} layers recomputed" if plan.recomputed else "no layer recomputed"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""
