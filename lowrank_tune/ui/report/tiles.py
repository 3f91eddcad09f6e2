"""The figures at the top of a page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lowrank_tune.config.schema import ONLINE_ALGORITHMS
from lowrank_tune.json_files import get_mapping
from lowrank_tune.training.run_totals import RunTotals, chain_totals
from lowrank_tune.ui.formatting import (
    clock,
    format_large,
    format_tick,
    percent,
    rate,
)
from lowrank_tune.ui.report.heldout import (
    StageStats,
    heldout_by_stage,
    heldout_by_stage_of_chain,
    heldout_pair_accuracy,
)
from lowrank_tune.ui.report.run_log import ChainLog, RunLog, StepValues

ARROW = " \u2192 "


@dataclass(frozen=True)
class Tile:
    """A figure and what it is."""

    value: str
    label: str
    change: str = ""
    is_wide: bool = False


def run_tiles(run_log: RunLog) -> list[Tile]:
    """Returns the figures of a run."""
    started = run_log.started
    tiles = [
        *_heldout_tiles(heldout_by_stage(run_log)),
        *_pair_tiles(run_log),
        *_training_tiles(run_log),
    ]
    steps = f" / {started.steps:,}" if started and started.steps else ""
    tiles.append(Tile(f"{run_log.step:,}{steps}", "steps"))
    tiles += _total_tiles(run_log.totals, "wall time")
    memory = run_log.series.get("memory_gib")
    if memory:
        tiles.append(Tile(f"{max(memory.values()):.2f} GiB", "peak memory"))
    if started and started.trainable:
        tiles.append(Tile(format_large(started.trainable), "trained parameters"))
    return tiles


def chain_tiles(chain: ChainLog) -> list[Tile]:
    """Returns the figures of a chain."""
    run_logs = chain.started_stages
    tiles = list(_heldout_tiles(heldout_by_stage_of_chain(chain)))
    for run_log in run_logs:
        tiles += _pair_tiles(run_log)
    done = sum(run_log.status == "done" for run_log in run_logs)
    tiles.append(Tile(f"{done} / {len(chain.stages)}", "stages"))
    totals = chain_totals([run_log.totals for run_log in run_logs])
    tiles += _total_tiles(totals, "wall time of the stages")
    return tiles


def _total_tiles(totals: RunTotals, time_label: str) -> Iterator[Tile]:
    """Yields wall time, tokens and speed of all sessions."""
    if totals.sessions > 1:
        time_label = f"{time_label}, {totals.sessions} sessions"
    yield Tile(clock(totals.seconds), time_label)
    if totals.tokens:
        yield Tile(format_large(totals.tokens), "tokens trained through")
        yield Tile(rate(totals.tokens_per_second), "tokens a second")


def _heldout_tiles(stages: StageStats) -> Iterator[Tile]:
    shares = [stats["accuracy"] for stats in stages.values() if "accuracy" in stats]
    if not shares:
        return
    first, last = shares[0], shares[-1]
    if len(shares) == 1:
        yield Tile(percent(first), "held-out exact answers, base")
        return
    change = f"{100 * (last - first):+.1f} points" if last > first else ""
    yield Tile(
        f"{percent(first)}{ARROW}{percent(last)}",
        "held-out exact answers",
        change,
        is_wide=True,
    )


def _pair_tiles(run_log: RunLog) -> Iterator[Tile]:
    share = heldout_pair_accuracy(run_log)
    if share is not None:
        yield Tile(percent(share), f"held-out pairs right, {run_log.algorithm}")


def _training_tiles(run_log: RunLog) -> Iterator[Tile]:
    checks = {step: loss for step, loss in run_log.checks.get("eval_loss", {}).items() if not math.isnan(loss)}
    if checks:
        best = min(checks, key=checks.__getitem__)
        yield Tile(
            format_tick(checks[best]),
            f"best validation loss, step {best:,}",
        )
    reward = run_log.series.get("reward") if run_log.algorithm in ONLINE_ALGORITHMS else None
    loss = run_log.series.get("loss")
    if reward:
        yield Tile(_first_and_last(reward), "reward, first and last step")
    elif loss:
        yield Tile(_first_and_last(loss), "loss, first and last step")
    kl = get_mapping(run_log.summary, "last").get("kl")
    if isinstance(kl, (int, float)):
        yield Tile(format_tick(kl), "KL to the reference at the end")


def _first_and_last(values: StepValues) -> str:
    return f"{values[min(values)]:.3f}{ARROW}{values[max(values)]:.3f}"
