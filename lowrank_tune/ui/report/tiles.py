"""The figures at the top of a page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lowrank_tune.config.schema import ONLINE_ALGORITHMS
from lowrank_tune.training.run_totals import RunTotals, chain_totals
from lowrank_tune.ui.formatting import (
    clock,
    format_large,
    number,
    percent,
    rate,
)
from lowrank_tune.ui.metrics import WITHOUT_REFERENCE, kl_metric
from lowrank_tune.ui.report.heldout import (
    StageStats,
    heldout_by_stage,
    heldout_by_stage_of_chain,
    heldout_pair_accuracy,
)
from lowrank_tune.ui.report.run_log import ChainLog, RunLog
from lowrank_tune.ui.trend import ARROW, first_and_last, trend


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
    memory = run_log.finite_values("memory_gib")
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


def _total_tiles(
    totals: RunTotals,
    time_label: str,
) -> Iterator[Tile]:
    """Yields wall time, tokens and speed of all sessions."""
    if totals.sessions > 1:
        time_label = f"{time_label}, {totals.sessions} sessions"
    yield Tile(clock(totals.seconds), time_label)
    if totals.tokens:
        yield Tile(format_large(totals.tokens), "tokens trained through")
        yield Tile(rate(totals.tokens_per_second), "tokens per second")


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
            number(checks[best]),
            f"validation loss, best (step {best:,})",
        )
    name = "reward" if run_log.algorithm in ONLINE_ALGORITHMS else "loss"
    values = list(run_log.finite_values(name).values())
    if values:
        yield Tile(trend(name, values), f"{name}, mean of the first and last tenth")
    kl = list(run_log.finite_values(kl_metric(run_log.algorithm)).values())
    if kl and run_log.algorithm not in WITHOUT_REFERENCE:
        yield Tile(number(first_and_last(kl)[1]), "KL to the reference, mean of the last tenth")
