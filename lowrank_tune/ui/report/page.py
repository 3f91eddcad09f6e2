"""The page: what happened in one look, warnings before anything else, then the sections."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files

from lowrank_tune.ui.formatting import clock, percent
from lowrank_tune.ui.metrics import GENERATIVE_ALGORITHMS, PAIR_ACCURACY, WITHOUT_REFERENCE
from lowrank_tune.ui.report import evaluations, frontier, groups, pairs, sections
from lowrank_tune.ui.report.charts import format_tick
from lowrank_tune.ui.report.html import get_mapping, get_number, text
from lowrank_tune.ui.report.run_log import ChainLog, RunLog


def page(run_log: RunLog) -> str:
    """The page of a run."""
    body = (
        f"{_header(run_log)}{alerts(issues(run_log), run_log.status)}{_tiles(run_log)}\n"
        f"{sections.heldout_section(run_log)}\n{evaluations.section(run_log.folder)}\n{_body(run_log)}"
    )
    return document(f"{_name(run_log)}, {run_log.status}", body, f"{run_log.folder.name}/events.jsonl")


def chain_page(chain: ChainLog) -> str:
    """The page of a chain: what came of all stages together, then each of them."""
    anchors = {folder: f"stage-{number}" for number, folder in enumerate(chain.stages, 1)}
    body = "\n".join(
        [
            _chain_header(chain),
            alerts(_chain_issues(chain), chain.status),
            _contents(chain, anchors),
            _chain_tiles(chain),
            sections.chain_heldout_section(chain),
            evaluations.section(chain.folder),
            sections.stage_table(chain),
            *(_stage(folder, run_log, anchors[folder], len(anchors)) for folder, run_log in chain.stages.items()),
        ]
    )
    return document(f"{chain.name}, {chain.status}", body, f"the stages of {chain.folder.name}")


def document(title: str, body: str, source: str) -> str:
    """One file, no address in it, and a policy that would not let it load anything."""
    style, script = (
        files("lowrank_tune.ui.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri "
        f"'none'; form-action 'none'"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(title)}</title>\n'
        f"<style>\n{style}</style></head>\n<body><main>{body}\n<footer>lowrank_tune, from {text(source)}. "
        f'This file needs nothing else.</footer></main><div id="tip" '
        f"hidden></div>\n<script>{script}</script></body></html>\n"
    )


def _body(run_log: RunLog) -> str:
    """What a run has to show below its figures."""
    parts = [
        sections.curves(run_log),
        frontier.section(run_log),
        groups.phases(run_log),
        groups.sampled_groups_html(run_log),
        pairs.scores(run_log),
        sections.samples(run_log),
        sections.data(run_log),
        sections.recipe(run_log),
        sections.environment(run_log),
        sections.notes(run_log),
    ]
    return "\n".join(part for part in parts if part)


def _stage(folder: str, run_log: RunLog | None, anchor_id: str, count: int) -> str:
    """A stage's part of a chain's page; the held-out questions stand above, over all stages."""
    number = anchor_id.removeprefix("stage-")
    if run_log is None:
        return (
            f'<details class="stage" id="{anchor_id}"><summary>Stage {number} of {count}: '
            f"{text(folder)}</summary><p>not begun</p></details>"
        )
    pill = f'<span class="pill {text(run_log.status)}">{text(run_log.status)}</span>'
    return (
        f'<details class="stage" id="{anchor_id}" open><summary>Stage {number} of {count}: {text(folder)} '
        f"{pill}</summary>\n"
        f"{_subtitle(run_log)}{alerts(issues(run_log), run_log.status)}{_tiles(run_log)}\n{_body(run_log)}</details>"
    )


def _chain_header(chain: ChainLog) -> str:
    pill = f'<span class="pill {text(chain.status)}">{text(chain.status)}</span>'
    started = next((run_log.started for run_log in chain.started_stages if run_log.started is not None), None)
    way = " \u2192 ".join(
        run_log.started.algorithm.upper() for run_log in chain.started_stages if run_log.started is not None
    )
    if started:
        subtitle = (
            f'<p class="sub"><b>{text(way)}</b> of <b>{text(started.model)}</b> on {text(started.device or "?")}</p>'
        )
    else:
        subtitle = ""
    return f'<header><div class="row"><h1>{text(chain.name, 200)}</h1>{pill}</div>{subtitle}</header>'


def _contents(chain: ChainLog, anchors: Mapping[str, str]) -> str:
    links = "".join(f'<a href="#{anchor_id}">{text(folder)}</a>' for folder, anchor_id in anchors.items())
    return f'<nav><span class="soft">Stages:</span> {links}</nav>'


def _chain_issues(chain: ChainLog) -> list[str]:
    messages = [
        f"{folder}: {issue}"
        for folder, run_log in chain.stages.items()
        if run_log is not None
        for issue in issues(run_log)
    ]
    return messages + [
        f"{folder}: this stage has not begun" for folder, run_log in chain.stages.items() if run_log is None
    ]


def _chain_tiles(chain: ChainLog) -> str:
    tiles = [
        *_heldout_tile(sections.heldout_by_stage_of_chain(chain)),
        *(tile for run_log in chain.started_stages for tile in _pairs_tile(run_log)),
    ]
    tiles.append(
        _tile(f"{sum(run_log.status == 'done' for run_log in chain.started_stages)} / {len(chain.stages)}", "stages")
    )
    tiles.append(_tile(clock(sum(run_log.seconds for run_log in chain.started_stages)), "wall time of the stages"))
    tiles.append(_tile(_large(sum(run_log.tokens for run_log in chain.started_stages)), "tokens trained through"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _name(run_log: RunLog) -> str:
    if run_log.started:
        return run_log.started.name
    return run_log.folder.name


def _header(run_log: RunLog) -> str:
    pill = f'<span class="pill {text(run_log.status)}">{text(run_log.status)}</span>'
    return f'<header><div class="row"><h1>{text(_name(run_log), 200)}</h1>{pill}</div>{_subtitle(run_log)}</header>'


def _subtitle(run_log: RunLog) -> str:
    """What was trained, on what, and against what."""
    started = run_log.started
    html = ""
    if started is not None:
        html = (
            f'<p class="sub"><b>{text(started.algorithm.upper())}</b> of <b>{text(started.model)}</b> on '
            f"{text(started.device or '?')}"
        )
        html += (
            "</p>" if started.algorithm in WITHOUT_REFERENCE else f"; reference: <b>{text(started.reference)}</b></p>"
        )
        html += f'<p class="sub">continued after step {started.resumed_from:,}</p>' if started.resumed_from else ""
    return html


def issues(run_log: RunLog) -> list[str]:
    """Warnings, and how the run broke."""
    if isinstance(run_log.summary.get("warnings"), list):
        messages = [str(message) for message in run_log.summary.get("warnings") or ()]
    else:
        messages = []
    messages = list(dict.fromkeys([*messages, *run_log.warnings]))
    broken = run_log.ended is not None and run_log.status != "done"
    if run_log.ended is not None and run_log.status == "failed":
        messages.insert(
            0, f"the run failed after step {run_log.step:,}: {run_log.ended.message or 'no reason is known'}"
        )
    elif run_log.ended is None:
        messages.insert(0, f"the run has not ended: step {run_log.step:,} is the last one here")
    elif broken:
        messages.insert(0, f"the run was interrupted after step {run_log.step:,}; the same command continues it")
    return messages


def alerts(messages: Sequence[str], status: str) -> str:
    kind = "alerts failed" if status == "failed" else "alerts"
    if messages:
        return f'<ul class="{kind}">{"".join(f"<li>{text(message, 800)}</li>" for message in messages)}</ul>'
    return ""


def _tiles(run_log: RunLog) -> str:
    tiles = [*_heldout_tile(sections.heldout_by_stage(run_log)), *_pairs_tile(run_log), *_loss_tiles(run_log)]
    steps = run_log.started.steps if run_log.started else 0
    tiles.append(_tile(f"{run_log.step:,}" + (f" / {steps:,}" if steps else ""), "steps"))
    tiles.append(_tile(clock(run_log.seconds), "wall time"))
    if run_log.tokens:
        tiles.append(_tile(_large(run_log.tokens), "tokens trained through"))
    if speeds := list(run_log.series.get("tokens_per_second", {}).values()):
        tiles.append(_tile(f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "tokens a second, median"))
    if memory := run_log.series.get("memory_gib"):
        tiles.append(_tile(f"{max(memory.values()):.2f} GiB", "peak memory"))
    if run_log.started and run_log.started.trainable:
        tiles.append(_tile(_large(run_log.started.trainable), "trained parameters"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(value: str, label: str, more: str = "", wide: bool = False) -> str:
    added = f" <i>{text(more)}</i>" if more else ""
    return f'<div class="tile{" wide" if wide else ""}"><b>{text(value)}</b><span>{text(label)}</span>{added}</div>'


def _pairs_tile(run_log: RunLog) -> list[str]:
    """Of the final adapter where it was measured, else of the last validation."""
    algorithm = run_log.started.algorithm if run_log.started else "sft"
    if algorithm not in PAIR_ACCURACY:
        return []
    scored = get_mapping(run_log.summary, "heldout_pairs")
    checks = run_log.checks.get(f"eval_{PAIR_ACCURACY[algorithm]}", {})
    if not checks and "accuracy" not in scored:
        return []
    share = get_number(scored, "accuracy", checks[max(checks)] if checks else 0.0)
    return [_tile(percent(share), f"held-out pairs right, {algorithm}")]


def _heldout_tile(heldout_by_stage: Mapping[str, Mapping[str, float]]) -> list[str]:
    shares = [stats["accuracy"] for stats in heldout_by_stage.values() if "accuracy" in stats]
    if not shares:
        return []
    if len(shares) == 1:
        return [_tile(percent(shares[0]), "held-out exact answers, base")]
    if shares[-1] > shares[0]:
        change = f"{100 * (shares[-1] - shares[0]):+.1f} points"
    else:
        change = ""
    return [_tile(f"{percent(shares[0])} \u2192 {percent(shares[-1])}", "held-out exact answers", change, wide=True)]


def _loss_tiles(run_log: RunLog) -> list[str]:
    tiles = []
    if checks := {step: value for step, value in run_log.checks.get("eval_loss", {}).items() if value == value}:
        best = min(checks, key=lambda step: checks[step])
        tiles.append(_tile(format_tick(checks[best]), f"best validation loss, step {best:,}"))
    if (
        run_log.started
        and run_log.started.algorithm in GENERATIVE_ALGORITHMS
        and (reward := run_log.series.get("reward"))
    ):
        tiles.append(
            _tile(f"{reward[min(reward)]:.3f} \u2192 {reward[max(reward)]:.3f}", "reward, first and last step")
        )
    elif loss := run_log.series.get("loss"):
        tiles.append(_tile(f"{loss[min(loss)]:.3f} \u2192 {loss[max(loss)]:.3f}", "loss, first and last step"))
    kl = get_mapping(run_log.summary, "last").get("kl")
    if isinstance(kl, (int, float)):
        tiles.append(_tile(format_tick(kl), "KL to the reference at the end"))
    return tiles


def _large(count: int) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,}"
