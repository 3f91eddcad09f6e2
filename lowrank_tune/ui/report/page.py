"""The page: what happened in one look, warnings before anything else, then the sections."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files

from lowrank_tune.ui.figures import clock, percent
from lowrank_tune.ui.metrics import WITHOUT_REFERENCE, WRITES
from lowrank_tune.ui.report import evaluations, frontier, groups, pairs, sections
from lowrank_tune.ui.report.charts import short
from lowrank_tune.ui.report.record import ChainRecord, Record
from lowrank_tune.ui.report.words import inside, number_in, text

PAIRED = ("reward", "dpo")


def page(record: Record) -> str:
    """The page of a run."""
    body = (
        f"{_header(record)}{alerts(troubles(record), record.status)}{_tiles(record)}\n{sections.heldout(record)}\n"
        f"{evaluations.section(record.folder)}\n{_body(record)}"
    )
    return document(f"{_name(record)}, {record.status}", body, f"{record.folder.name}/events.jsonl")


def chain_page(chain: ChainRecord) -> str:
    """The page of a chain: what came of all stages together, then each of them."""
    places = {folder: f"stage-{number}" for number, folder in enumerate(chain.stages, 1)}
    body = "\n".join(
        [
            _chain_header(chain),
            alerts(_chain_troubles(chain), chain.status),
            _contents(chain, places),
            _chain_tiles(chain),
            sections.heldout_of_chain(chain),
            evaluations.section(chain.folder),
            sections.stage_table(chain),
            *(_stage(folder, record, places[folder], len(places)) for folder, record in chain.stages.items()),
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


def _body(record: Record) -> str:
    """What a run has to show below its figures."""
    parts = [
        sections.curves(record),
        frontier.section(record),
        groups.phases(record),
        groups.over_time(record),
        pairs.scores(record),
        sections.samples(record),
        sections.data(record),
        sections.recipe(record),
        sections.environment(record),
        sections.notes(record),
    ]
    return "\n".join(part for part in parts if part)


def _stage(folder: str, record: Record | None, place: str, count: int) -> str:
    """A stage's part of a chain's page; the held-out questions stand above, over all stages."""
    number = place.removeprefix("stage-")
    if record is None:
        return (
            f'<details class="stage" id="{place}"><summary>Stage {number} of {count}: '
            f"{text(folder)}</summary><p>not begun</p></details>"
        )
    pill = f'<span class="pill {text(record.status)}">{text(record.status)}</span>'
    return (
        f'<details class="stage" id="{place}" open><summary>Stage {number} of {count}: {text(folder)} '
        f"{pill}</summary>\n"
        f"{_told_of(record)}{alerts(troubles(record), record.status)}{_tiles(record)}\n{_body(record)}</details>"
    )


def _chain_header(chain: ChainRecord) -> str:
    pill = f'<span class="pill {text(chain.status)}">{text(chain.status)}</span>'
    started = next((record.started for record in chain.begun if record.started is not None), None)
    way = " \u2192 ".join(record.started.algorithm.upper() for record in chain.begun if record.started is not None)
    told = (
        f'<p class="sub"><b>{text(way)}</b> of <b>{text(started.model)}</b> on {text(started.device or "?")}</p>'
        if started
        else ""
    )
    return f'<header><div class="row"><h1>{text(chain.name, 200)}</h1>{pill}</div>{told}</header>'


def _contents(chain: ChainRecord, places: Mapping[str, str]) -> str:
    links = "".join(f'<a href="#{place}">{text(folder)}</a>' for folder, place in places.items())
    return f'<nav><span class="soft">Stages:</span> {links}</nav>'


def _chain_troubles(chain: ChainRecord) -> list[str]:
    told = [
        f"{folder}: {trouble}"
        for folder, record in chain.stages.items()
        if record is not None
        for trouble in troubles(record)
    ]
    return told + [f"{folder}: this stage has not begun" for folder, record in chain.stages.items() if record is None]


def _chain_tiles(chain: ChainRecord) -> str:
    tiles = [
        *_heldout_tile(sections.stages_of_chain(chain)),
        *(tile for record in chain.begun for tile in _pairs_tile(record)),
    ]
    tiles.append(_tile(f"{sum(record.status == 'done' for record in chain.begun)} / {len(chain.stages)}", "stages"))
    tiles.append(_tile(clock(sum(_lasted(record) for record in chain.begun)), "wall time of the stages"))
    tiles.append(_tile(_large(sum(record.tokens for record in chain.begun)), "tokens trained through"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _name(record: Record) -> str:
    return record.started.name if record.started else record.folder.name


def _header(record: Record) -> str:
    pill = f'<span class="pill {text(record.status)}">{text(record.status)}</span>'
    return f'<header><div class="row"><h1>{text(_name(record), 200)}</h1>{pill}</div>{_told_of(record)}</header>'


def _told_of(record: Record) -> str:
    """What was trained, on what, and against what."""
    started, told = record.started, ""
    if started is not None:
        told = (
            f'<p class="sub"><b>{text(started.algorithm.upper())}</b> of <b>{text(started.model)}</b> on '
            f"{text(started.device or '?')}"
        )
        told += (
            "</p>" if started.algorithm in WITHOUT_REFERENCE else f"; reference: <b>{text(started.reference)}</b></p>"
        )
        told += f'<p class="sub">continued after step {started.resumed_from:,}</p>' if started.resumed_from else ""
    return told


def troubles(record: Record) -> list[str]:
    """Warnings, and how the run broke."""
    told = (
        [str(each) for each in record.summary.get("warnings") or ()]
        if isinstance(record.summary.get("warnings"), list)
        else []
    )
    told = list(dict.fromkeys([*told, *record.warnings]))
    broken = record.ended is not None and record.status != "done"
    if record.ended is not None and record.status == "failed":
        told.insert(0, f"the run failed after step {record.step:,}: {record.ended.message or 'no reason is known'}")
    elif record.ended is None:
        told.insert(0, f"the run has not ended: step {record.step:,} is the last one here")
    elif broken:
        told.insert(0, f"the run was interrupted after step {record.step:,}; the same command continues it")
    return told


def alerts(told: Sequence[str], status: str) -> str:
    kind = "alerts failed" if status == "failed" else "alerts"
    return f'<ul class="{kind}">{"".join(f"<li>{text(each, 800)}</li>" for each in told)}</ul>' if told else ""


def _tiles(record: Record) -> str:
    tiles = [*_heldout_tile(sections.stages_of(record)), *_pairs_tile(record), *_loss_tiles(record)]
    steps = record.started.steps if record.started else 0
    tiles.append(_tile(f"{record.step:,}" + (f" / {steps:,}" if steps else ""), "steps"))
    tiles.append(_tile(clock(_lasted(record)), "wall time"))
    if record.tokens:
        tiles.append(_tile(_large(record.tokens), "tokens trained through"))
    if speeds := list(record.series.get("tokens_per_second", {}).values()):
        tiles.append(_tile(f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "tokens a second, median"))
    if memory := record.series.get("memory_gib"):
        tiles.append(_tile(f"{max(memory.values()):.2f} GiB", "peak memory"))
    if record.started and record.started.trainable:
        tiles.append(_tile(_large(record.started.trainable), "trained parameters"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(value: str, what: str, more: str = "", wide: bool = False) -> str:
    added = f" <i>{text(more)}</i>" if more else ""
    return f'<div class="tile{" wide" if wide else ""}"><b>{text(value)}</b><span>{text(what)}</span>{added}</div>'


def _lasted(record: Record) -> float:
    return record.ended.seconds if record.ended else record.last - record.began


def _pairs_tile(record: Record) -> list[str]:
    """Of the final adapter where it was measured, else of the last validation."""
    scored, checks = inside(record.summary, "heldout_pairs"), record.checks.get("validation_accuracy", {})
    algorithm = record.started.algorithm if record.started else "sft"
    if algorithm not in PAIRED or not (checks or "accuracy" in scored):
        return []
    share = number_in(scored, "accuracy", checks[max(checks)] if checks else 0.0)
    return [_tile(percent(share), f"held-out pairs right, {algorithm}")]


def _heldout_tile(stages: Mapping[str, Mapping[str, float]]) -> list[str]:
    shares = [stats["exact"] for stats in stages.values() if "exact" in stats]
    if not shares:
        return []
    if len(shares) == 1:
        return [_tile(percent(shares[0]), "held-out exact answers, base")]
    change = f"{100 * (shares[-1] - shares[0]):+.1f} points" if shares[-1] > shares[0] else ""
    return [_tile(f"{percent(shares[0])} \u2192 {percent(shares[-1])}", "held-out exact answers", change, wide=True)]


def _loss_tiles(record: Record) -> list[str]:
    tiles = []
    if checks := {step: value for step, value in record.checks.get("validation_loss", {}).items() if value == value}:
        best = min(checks, key=lambda step: checks[step])
        tiles.append(_tile(short(checks[best]), f"best validation loss, step {best:,}"))
    if record.started and record.started.algorithm in WRITES and (reward := record.series.get("reward")):
        tiles.append(
            _tile(f"{reward[min(reward)]:.3f} \u2192 {reward[max(reward)]:.3f}", "reward, first and last step")
        )
    elif loss := record.series.get("loss"):
        tiles.append(_tile(f"{loss[min(loss)]:.3f} \u2192 {loss[max(loss)]:.3f}", "loss, first and last step"))
    kl = inside(record.summary, "last").get("kl")
    if isinstance(kl, (int, float)):
        tiles.append(_tile(short(kl), "KL to the reference at the end"))
    return tiles


def _large(count: int) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,}"
