"""The page: what happened in one look, warnings before anything else, then the sections."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from lowrank_tune.ui.plain import clock, percent
from lowrank_tune.ui.report import sections
from lowrank_tune.ui.report.charts import short
from lowrank_tune.ui.report.record import Record
from lowrank_tune.ui.report.words import inside, text


def page(record: Record) -> str:
    """The HTML of a report: one file, no address in it, and a policy that would not let it load anything."""
    style, script = (files("lowrank_tune.ui.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    parts = [sections.heldout(record), sections.curves(record), sections.samples(record), sections.data(record), sections.recipe(record),
             sections.environment(record), sections.notes(record)]  # fmt: skip
    body = "\n".join(part for part in parts if part)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(_name(record))}, {text(record.status)}</title>\n'
            f"<style>\n{style}</style></head>\n<body><main>{_header(record)}{_alerts(record)}{_tiles(record)}\n"
            f'{body}\n<footer>lowrank_tune, from {text(record.folder.name)}/events.jsonl. '
            f'This file needs nothing else.</footer></main><div id="tip" hidden></div>\n<script>{script}</script></body></html>\n')  # fmt: skip


def _name(record: Record) -> str:
    return record.started.name if record.started else record.folder.name


def _header(record: Record) -> str:
    started = record.started
    pill = f'<span class="pill {text(record.status)}">{text(record.status)}</span>'
    told = ""
    if started is not None:
        told = f'<p class="sub"><b>{text(started.algorithm.upper())}</b> of <b>{text(started.model)}</b> on {text(started.device or "?")}; '
        told += f"reference: <b>{text(started.reference)}</b></p>"
        told += f'<p class="sub">continued after step {started.resumed_from:,}</p>' if started.resumed_from else ""
    return f'<header><div class="row"><h1>{text(_name(record), 200)}</h1>{pill}</div>{told}</header>'


def _alerts(record: Record) -> str:
    """Warnings, and how the run broke."""
    told = [str(each) for each in record.summary.get("warnings") or ()] if isinstance(record.summary.get("warnings"), list) else []
    told = list(dict.fromkeys([*told, *record.warnings]))
    broken = record.ended is not None and record.status != "done"
    if record.ended is not None and record.status == "failed":
        told.insert(0, f"the run failed after step {record.step:,}: {record.ended.message or 'no reason is known'}")
    elif record.ended is None:
        told.insert(0, f"the run has not ended: step {record.step:,} is the last one here")
    elif broken:
        told.insert(0, f"the run was interrupted after step {record.step:,}; the same command continues it")
    kind = "alerts failed" if record.status == "failed" else "alerts"
    return f'<ul class="{kind}">{"".join(f"<li>{text(each, 800)}</li>" for each in told)}</ul>' if told else ""


def _tiles(record: Record) -> str:
    tiles = [*_heldout_tile(record), *_loss_tiles(record)]
    steps = record.started.steps if record.started else 0
    tiles.append(_tile(f"{record.step:,}" + (f" / {steps:,}" if steps else ""), "steps"))
    tiles.append(_tile(clock(record.ended.seconds if record.ended else record.last - record.began), "wall time"))
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


def _heldout_tile(record: Record) -> list[str]:
    shares = [stats["exact"] for stats in sections.stages_of(record).values() if "exact" in stats]
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
    if loss := record.series.get("loss"):
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
