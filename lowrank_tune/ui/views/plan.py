"""A memory plan in a terminal: a table of phases, the phase with the highest peak, and whether it fits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

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
from lowrank_tune.memory_planner.run_length import Span
from lowrank_tune.memory_planner.run_time import RunTime, sum_of_hours
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.views.run_time import ESTIMATE, duration, show_run_time

COLUMN_NAMES = {
    "optimizer": "optim.",
    "gradients": "grads",
    "activations": "activ.",
    "KV cache": "KV",
}
"""Short names of columns, so that the table fits into 80 columns."""
MIB = 1 << 20
MIN_GIB_PEAK = GIB // 10
"""Peak below which the figures are in MiB."""
STAGE_SETTING = re.compile(r"(?<![\w.])(?=(?:adapters|data|evaluate|rollout|train)\.\w)")
"""The position before a setting that each stage of a chain has for itself."""


def show(
    plan: Plan,
    console: Console,
    in_chain: bool = False,
) -> None:
    """Prints the plan of a recipe, or of one stage of a chain."""
    for heading in headline(plan):
        console.print(Text(heading, "bold"))
    console.print(_table(plan))
    for line in lines(plan, in_chain):
        console.print(line)


class PlanPrinter:
    """Prints the plans of a recipe, or of the stages of a chain, one after the other."""

    def __init__(self, console: Console, in_chain: bool) -> None:
        self.console = console
        self.in_chain = in_chain
        self.plans: list[Plan] = []
        self.run_times: list[RunTime] = []

    def show(self, plan: Plan, run_time: RunTime | None) -> None:
        """Prints the plan of one stage, and its time if it is known."""
        if self.plans:
            self.console.print()
        show(plan, self.console, self.in_chain)
        self.plans.append(plan)
        if run_time is not None:
            self.console.print()
            show_run_time(run_time, self.console)
            self.run_times.append(run_time)

    def finish(self, note: str) -> None:
        """Prints a note on the GPU, and the summary of a chain in one line."""
        if note:
            self.console.print(note)
        if self.in_chain:
            self.console.print()
            summary = chain_summary(self.plans, sum_of_hours(self.run_times))
            self.console.print(summary, soft_wrap=True)


def chain_summary(plans: Sequence[Plan], hours: Span | None) -> Text:
    """Returns the stage of a chain that needs most of the available memory, whether it fits, and the hours of all
    stages if they are known."""
    worst = max(plans, key=_need)
    summary = f"worst stage: {escape_control_chars(worst.name)}, "
    style = "bold"
    if not worst.vram:
        summary += f"{_gib(worst.needed)} GiB"
    elif worst.fits:
        summary += f"{_used(worst)}, fits"
        style = "bold green"
    else:
        summary += f"{_used(worst)}, does not fit"
        style = "bold red"
    if hours is not None:
        summary += f"; all stages: {duration(hours)} ({ESTIMATE})"
    return Text(summary, style)


def _need(plan: Plan) -> tuple[bool, float]:
    """Orders stages: one that does not fit is above one that fits, then by the share of the memory."""
    return not plan.fits, plan.needed / (plan.vram or 1)


def _table(plan: Plan) -> Table:
    in_gib = plan.peak >= MIN_GIB_PEAK
    divisor = GIB if in_gib else MIB
    used = [purpose for purpose in PURPOSES if any(phase.bytes.get(purpose) for phase in plan.phases)]
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 0, 0, 1),
        header_style="dim",
    )
    table.add_column("GiB at its peak" if in_gib else "MiB at its peak", no_wrap=True)
    for purpose in used:
        table.add_column(
            COLUMN_NAMES.get(purpose, purpose),
            justify="right",
            no_wrap=True,
        )
    table.add_column("all", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for phase in plan.phases:
        mark = ""
        style = ""
        if phase is plan.peak_phase:
            mark = "<"
            style = "green" if plan.fits else "bold red"
        cells = [_figure(phase.bytes.get(purpose, 0), divisor) for purpose in used]
        table.add_row(
            Text(phase.name),
            *cells,
            _figure(phase.total, divisor),
            mark,
            style=style,
        )
    return table


def headline(plan: Plan) -> tuple[str, str]:
    """Returns what is planned, in two lines."""
    sizes = plan.sizes
    unit = "row"
    if sizes.rows_per_unit == 2:
        unit = "pair"
    elif sizes.num_rollouts:
        unit = "completion"
    units = f"{sizes.units} {unit}s" if sizes.units > 1 else f"{sizes.units} {unit}"
    name = plan.name or plan.algorithm
    return (
        escape_control_chars(f"{name}: {plan.algorithm} of {plan.model}, {plan.bits} bits"),
        f"a micro-batch is {units} of {sizes.length:,} tokens; {_recomputed(plan)}",
    )


def lines(plan: Plan, in_chain: bool = False) -> list[Text]:
    """Returns the phase with the highest peak, whether the plan fits, what would fit, and the settings to change; of a
    stage of a chain as `stages.NAME.train...`."""
    peak = plan.peak_phase
    where = f" ({peak.where})" if peak.where else ""
    texts = [Text(f"most is held in: {peak.name}{where}")]
    if not plan.vram:
        return [
            *texts,
            Text(f"needs {_gib(plan.peak)} GiB of this machine's memory for tensors"),
            *_other_bits_lines(plan),
        ]
    texts.append(_fit_line(plan))
    texts += _room_lines(plan)
    texts += _other_bits_lines(plan)
    if plan.advice:
        advice = STAGE_SETTING.sub(f"stages.{plan.name}.", plan.advice) if in_chain else plan.advice
        texts.append(Text(advice, "yellow"))
    return texts + [Text(note, "dim") for note in plan.notes]


def _fit_line(plan: Plan) -> Text:
    parts = f"tensors {_gib(plan.peak)}, CUDA itself {_gib(CUDA_CONTEXT_BYTES)}, lost {FRAGMENTATION:.0%}"
    if plan.fits:
        return Text(f"fits: {_used(plan)} ({parts})", "green")
    return Text(f"does not fit: {_used(plan)} ({parts})", "bold red")


def _room_lines(plan: Plan) -> Iterator[Text]:
    if plan.fits:
        for phase in plan.split_phases:
            at_once = _gib(needed(phase.total, plan.device))
            yield Text(f"{phase.name} runs in smaller pieces: at once it needs {at_once} GiB")
    if plan.max_micro_batch_size and plan.fits_length:
        yield Text(
            f"room for a micro-batch of {plan.max_micro_batch_size}, or for rows of {plan.fits_length:,} tokens, "
            f"{plan.sizes.units} at once"
        )


def _other_bits_lines(plan: Plan) -> Iterator[Text]:
    other = plan.other_bits
    if other is not None:
        verdict = ""
        if plan.vram:
            verdict = ", fits" if other.fits else ", does not fit"
        yield Text(f"with base.bits={other.bits}: {_gib(other.needed)} GiB{verdict}")


def _used(plan: Plan) -> str:
    """Returns the needed part of the GPU's memory. The first number is at most the second only if the plan fits: two
    sizes that round to the same number are rounded away from each other if it does not."""
    needed_gib = _gib(plan.needed)
    vram_gib = _gib(plan.vram)
    if not plan.fits and needed_gib == vram_gib:
        needed_gib = f"{math.ceil(100 * plan.needed / GIB) / 100:.2f}"
        vram_gib = f"{math.floor(100 * plan.vram / GIB) / 100:.2f}"
    return f"{needed_gib} of {vram_gib} GiB"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _recomputed(plan: Plan) -> str:
    if plan.recomputed == plan.layers:
        return "all layers are recomputed"
    if plan.recomputed:
        return f"{plan.recomputed} of {plan.layers} layers are recomputed"
    return "no layer is recomputed"


def _figure(size: int, divisor: int) -> str:
    return f"{size / divisor:.2f}" if size else ""
