"""The page of a run and of a chain: what happened at a glance, warnings before everything else, then the sections."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from lowrank_tune.config.schema import ONLINE_ALGORITHMS
from lowrank_tune.json_files import get_list, get_mapping, get_number
from lowrank_tune.ui.formatting import percent
from lowrank_tune.ui.html import document, render
from lowrank_tune.ui.report import evaluations, frontier, groups, pairs
from lowrank_tune.ui.report.appendix import appendix
from lowrank_tune.ui.report.curves import curves
from lowrank_tune.ui.report.dataset import data
from lowrank_tune.ui.report.heldout import (
    chain_heldout_section,
    heldout_section,
)
from lowrank_tune.ui.report.run_log import ChainLog, RunLog
from lowrank_tune.ui.report.samples import samples
from lowrank_tune.ui.report.tiles import Tile, chain_tiles, run_tiles
from lowrank_tune.ui.trend import ARROW, trend


@dataclass(frozen=True)
class StageRow:
    """A stage of a chain in one row of a table; its cells are empty if it has not begun."""

    folder: str
    algorithm: str = ""
    status: str = "not begun"
    reference: str = ""
    steps: str = ""
    trend: str = ""
    pair_accuracy: str = ""


@dataclass(frozen=True)
class StagePart:
    """The part of a chain's page about one stage; `run` is None if it has not begun."""

    number: int
    folder: str
    run: RunLog | None

    @property
    def issues(self) -> list[str]:
        return issues(self.run) if self.run else []

    @property
    def tiles(self) -> list[Tile]:
        return run_tiles(self.run) if self.run else []

    @property
    def sections(self) -> Markup:
        return _sections(self.run) if self.run else Markup()


def page(run_log: RunLog) -> str:
    """Returns the page of a run."""
    body = render(
        "run",
        run=run_log,
        issues=issues(run_log),
        tiles=run_tiles(run_log),
        heldout=heldout_section(run_log),
        evaluations=evaluations.section(run_log.folder),
        sections=_sections(run_log),
    )
    return document(
        f"{run_log.name}, {run_log.status}",
        body,
        f"{run_log.folder.name}/events.jsonl",
    )


def chain_page(chain: ChainLog) -> str:
    """Returns the page of a chain: the results of all stages together, then each of them."""
    starts = [run_log.started for run_log in chain.started_stages if run_log.started]
    stages = [StagePart(number, *stage) for number, stage in enumerate(chain.stages.items(), 1)]
    body = render(
        "chain",
        chain=chain,
        starts=starts,
        algorithms=ARROW.join(started.algorithm.upper() for started in starts),
        issues=_chain_issues(chain),
        tiles=chain_tiles(chain),
        heldout=chain_heldout_section(chain),
        evaluations=evaluations.section(chain.folder),
        stage_rows=[_stage_row(stage.folder, stage.run) for stage in stages],
        stages=stages,
    )
    return document(
        f"{chain.name}, {chain.status}",
        body,
        f"the stages of {chain.folder.name}",
    )


def _sections(run_log: RunLog) -> Markup:
    """Returns the sections below the figures; a section without content is empty."""
    return Markup("\n").join(
        (
            curves(run_log),
            frontier.section(run_log),
            groups.phases(run_log),
            groups.sampled_groups(run_log),
            pairs.scores(run_log),
            samples(run_log),
            data(run_log),
            appendix(run_log),
        )
    )


def _stage_row(
    folder: str,
    run_log: RunLog | None,
) -> StageRow:
    if run_log is None:
        return StageRow(folder)
    if run_log.started is None:
        return StageRow(folder, status=run_log.status)
    pairs_scored = get_mapping(run_log.summary, "heldout_pairs")
    return StageRow(
        folder,
        run_log.algorithm,
        run_log.status,
        run_log.started.reference,
        f"{run_log.step:,} / {run_log.started.steps:,}",
        _trend(run_log),
        percent(get_number(pairs_scored, "accuracy")) if "accuracy" in pairs_scored else "",
    )


def _trend(run_log: RunLog) -> str:
    """Returns the reward, or the loss, of the first and of the last tenth of the steps."""
    name = "reward" if run_log.algorithm in ONLINE_ALGORITHMS else "loss"
    values = list(run_log.finite_values(name).values())
    return f"{name} {trend(name, values)}" if values else ""


def issues(run_log: RunLog) -> list[str]:
    """Returns how the run ended, unless it is done, and its warnings."""
    warnings = [str(message) for message in get_list(run_log.summary, "warnings")]
    return [
        *_bad_end(run_log),
        *dict.fromkeys([*warnings, *run_log.warnings]),
    ]


def _bad_end(run_log: RunLog) -> list[str]:
    step = f"{run_log.step:,}"
    if run_log.ended is None:
        return [f"the run has not ended: step {step} is the last one here"]
    if run_log.status == "failed":
        return [f"the run failed after step {step}: {run_log.ended.message or 'no reason is known'}"]
    if run_log.status != "done":
        return [f"the run was interrupted after step {step}; the same command continues it"]
    return []


def _chain_issues(chain: ChainLog) -> list[str]:
    messages = []
    pending = []
    for folder, run_log in chain.stages.items():
        if run_log is None:
            pending.append(f"{folder}: this stage has not begun")
        else:
            messages += [f"{folder}: {issue}" for issue in issues(run_log)]
    return messages + pending
