"""The parts of the page, from the curves down. Each is a string of HTML, empty where the run has nothing to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lowrank_tune.evaluation.grading import is_exact
from lowrank_tune.events import SampleLogged
from lowrank_tune.ui.formatting import number, percent
from lowrank_tune.ui.metrics import (
    GENERATIVE_ALGORITHMS,
    PAIR_SIDES,
    TITLES,
    descriptions_of,
    heldout_parts,
    metric_label,
    paired_metric,
    reference_name,
    reward_names,
)
from lowrank_tune.ui.report import pairs as of_pairs
from lowrank_tune.ui.report.charts import (
    ChartLine,
    bar,
    chart,
    format_tick,
    histogram,
    hover_data,
    lines_of,
    pair_lines,
)
from lowrank_tune.ui.report.html import block, entries, get_mapping, get_number, pairs, table, text
from lowrank_tune.ui.report.run_log import ChainLog, RunLog

HEADS = {
    "": "(all)",
    "accuracy": "exact answers (pass@1)",
    "eos_rate": "stops by itself",
    "mean_length": "tokens an answer",
}
NOT_LOG = (
    "accuracy",
    "mean_token_accuracy",
    "rewards/accuracies",
    "updated_param_fraction",
    "heldout/accuracy",
    "heldout/eos_rate",
    "completions/clipped_ratio",
    "frac_reward_zero_std",
    "clip_ratio",
    "value_clip_ratio",
    "explained_variance",
)
MAX_SAMPLES = 24  # of one prompt over a run


def curves(run_log: RunLog) -> str:
    """A chart for every statistic there is, the validation's beside the step's; those of held-out prompts and pairs
    have a table."""
    algorithm = run_log.started.algorithm if run_log.started else "sft"
    meanings = descriptions_of(algorithm)
    checked = {name.removeprefix("eval_") for name in run_log.checks}
    partners = {other for name in meanings if (other := paired_metric(algorithm, name)) is not None}
    if algorithm in GENERATIVE_ALGORITHMS:  # of several rewards each one's own curve stands right behind the whole
        base_meanings = meanings
        meanings = {}
        for name, meaning in base_meanings.items():
            meanings[name] = meaning
            meanings |= {
                reward_name: "this reward by itself"
                for reward_name in sorted(reward_names(run_log.series))
                if name == "reward"
            }
    names = [*meanings, *sorted({*run_log.series, *checked} - set(meanings) - partners)]
    cards = [_curve(name, meanings.get(name, ""), paired_metric(algorithm, name), run_log) for name in names]
    cards = [card for card in cards if card]
    if cards:
        return f'<h2>Curves</h2><div class="grid2">{"".join(cards)}</div>'
    return ""


def _curve(name: str, meaning: str, partner: str | None, run_log: RunLog) -> str:
    points = run_log.series.get(name, {})
    checks = run_log.checks.get(f"eval_{name}", {})
    if (name.startswith(("heldout/", "pairs/")) and not points) or (
        name in ("skipped_steps", "oom_retries") and not any(points.values())
    ):
        return ""
    lines = lines_of(name, points, checks, f"validation {name}")
    title = metric_label(name)
    if partner is not None:
        lines = pair_lines(
            {
                metric_name: run_log.series.get(metric_name) or run_log.checks.get(f"eval_{metric_name}", {})
                for metric_name in (name, partner)
            }
        )
        title = ""
    return chart_card(title or TITLES[name], meaning, lines, name not in NOT_LOG, points or checks)


def chart_card(
    title: str,
    meaning: str,
    lines: Sequence[ChartLine],
    may_log: bool,
    points: Mapping[int, float],
) -> str:
    svg = chart(lines)
    if not svg:
        return ""
    values = [value for line in lines for _, value in line.points]
    can_log = may_log and min(values) > 0 and max(values) / min(values) > 3
    if can_log:
        toggle = '<label class="soft"><input type="checkbox"> log scale</label>'
    else:
        toggle = ""
    if len(lines) > 1:
        legend = "".join(f'<span><i class="key {line.kind}"></i>{text(line.name)}</span>' for line in lines)
    else:
        legend = ""
    if points:
        last = f"<output>{format_tick(points[max(points)])}</output>"
    else:
        last = ""
    return (
        f'<div class="card" data-lines="{hover_data(lines)}"><div class="top"><h3>{text(title)}</h3>'
        f'{last}</div><p class="soft">{text(meaning)}</p>'
        f'{svg}{chart(lines, log=True) if can_log else ""}<div class="legend">{legend}{toggle}</div></div>'
    )


def heldout_by_stage(run_log: RunLog) -> dict[str, dict[str, float]]:
    """Held-out figures of the base and of each stage: from the summary, or from the events of a run that has none."""
    details = get_mapping(run_log.summary, "heldout_details")
    stats_by_stage = {
        str(stage): {str(key): get_number(stats, key) for key in stats}
        for stage, stats in details.items()
        if isinstance(stats, Mapping)
    }
    if stats_by_stage:
        return stats_by_stage
    for name, points in run_log.checks.items():
        if name.startswith("heldout/") and points:
            stage, key = heldout_parts(name)
            stats_by_stage.setdefault(stage, {})[key] = points[max(points)]
    return stats_by_stage


def heldout_by_stage_of_chain(chain: ChainLog) -> dict[str, dict[str, float]]:
    """Held-out figures of the base and of every stage that has some; what was measured first stands first."""
    stats_by_stage: dict[str, dict[str, float]] = {}
    for run_log in chain.started_stages:
        for who, stats in heldout_by_stage(run_log).items():
            stats_by_stage.setdefault(who, stats)
    return stats_by_stage


def heldout_section(run_log: RunLog) -> str:
    """A column a stage, with bars for shares; then the same questions as each stage answers them."""
    return _heldout(heldout_by_stage(run_log), [run_log.summary])


def chain_heldout_section(chain: ChainLog) -> str:
    """The same over the base and all stages."""
    return _heldout(heldout_by_stage_of_chain(chain), [run_log.summary for run_log in chain.started_stages])


def _heldout(stages: Mapping[str, Mapping[str, float]], summaries: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return ""
    keys = [*dict.fromkeys(key for stats in stages.values() for key in stats)]
    keys.sort(key=lambda key: (key == "mean_length", key == "eos_rate", key != "accuracy"))
    rows = [
        [
            text(HEADS.get(key) or (f"one of {key[8:]} exact (pass@{key[8:]})" if key.startswith("pass_at_") else key)),
            *(_figure(key, stats.get(key)) for stats in stages.values()),
        ]
        for key in keys
    ]
    html = f'<h2>Held-out questions</h2><div class="card">{table(["", *map(text, stages)], rows)}</div>'
    answers: dict[str, list[Mapping[str, Any]]] = {}
    for by_stage in (get_mapping(summary, "answers") for summary in summaries):
        for stage in by_stage:
            answers.setdefault(str(stage), entries(by_stage, stage))
    shown = list(zip(*answers.values(), strict=False))
    if not shown:
        return html
    lines = [
        [
            _text_block(row_answers[0].get("prompt")),
            text(row_answers[0].get("ground_truth") or "", 200),
            *map(_answer, row_answers),
        ]
        for row_answers in shown
    ]
    return html + f'<div class="card">{table(["question", "gold", *map(text, answers)], lines)}</div>'


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key == "mean_length":
        return number(value)
    return f"{percent(value)}{bar(value)}"


def _text_block(value: Any) -> str:
    return f'<div class="text">{block(value or "", 1500)}</div>'


def _answer(answer: Mapping[str, Any]) -> str:
    return _graded_answer(str(answer.get("completion", "")), bool(answer.get("stopped")), answer.get("ground_truth"))


def _graded_answer(completion: str, ended_with_eos: bool, ground_truth: Any) -> str:
    """An answer with what became of it; one that runs on has not answered."""
    exact = ended_with_eos and isinstance(ground_truth, str) and is_exact(completion, ground_truth)
    if exact:
        verdict = '<span class="yes">&#10003; right</span>'
    elif isinstance(ground_truth, str):
        verdict = '<span class="no">&#10007; wrong</span>'
    else:
        verdict = ""
    return (
        f'<div class="text">{block(completion, 1500)}</div><span class="soft">{verdict} '
        f"{'' if ended_with_eos else 'runs on'}</span>"
    )


def stage_table(chain: ChainLog) -> str:
    """The stages in a line each."""
    rows = []
    for folder, run_log in chain.stages.items():
        if run_log is None or run_log.started is None:
            rows.append([text(folder), "", "not begun" if run_log is None else text(run_log.status), "", "", "", ""])
            continue
        writes = run_log.started.algorithm in GENERATIVE_ALGORITHMS
        right = get_mapping(run_log.summary, "heldout_pairs")
        points = run_log.series.get("reward" if writes else "loss", {})
        rows.append(
            [
                text(folder),
                text(run_log.started.algorithm),
                text(run_log.status),
                text(run_log.started.reference),
                f"{run_log.step:,} / {run_log.started.steps:,}",
                _trend(points, "reward " if writes else ""),
                percent(get_number(right, "accuracy")) if "accuracy" in right else "",
            ]
        )
    head = ["stage", "algorithm", "status", "reference", "steps", "loss, or reward", "held-out pairs right"]
    return f'<h2>Stages</h2><div class="card">{table(head, rows)}</div>'


def _trend(points: Mapping[int, float], prefix: str) -> str:
    if points:
        return f"{prefix}{format_tick(points[min(points)])} \u2192 {format_tick(points[max(points)])}"
    return ""


def samples(run_log: RunLog) -> str:
    """The same prompts, step by step; of pairs, their scores."""
    names = {"reference": reference_name(run_log.started.roles) if run_log.started else "base"}
    by_prompt: dict[str, list[SampleLogged]] = {}
    for sample in run_log.samples:
        if sample.role in PAIR_SIDES:
            continue
        by_prompt.setdefault(str(sample.prompt), []).append(sample)
    parts = []
    for index, (prompt, prompt_samples) in enumerate(by_prompt.items()):
        every = max(1, -(-len(prompt_samples) // MAX_SAMPLES))
        shown_samples = [*prompt_samples[:-1:every], prompt_samples[-1]]
        rows = [
            [
                text(
                    f"step {shown_sample.step:,}"
                    if shown_sample.role == "policy"
                    else names.get(str(shown_sample.role), shown_sample.role)
                ),
                _graded_answer(
                    str(shown_sample.completion),
                    shown_sample.finish_reason == "stop",
                    shown_sample.ground_truth,
                ),
                "" if shown_sample.reward is None else number(shown_sample.reward),
            ]
            for shown_sample in shown_samples
        ]
        if prompt_samples[0].ground_truth is not None:
            ground_truth = f' <span class="soft">gold {text(prompt_samples[0].ground_truth, 80)}</span>'
        else:
            ground_truth = ""
        body = table(
            ["", "answer", "reward" if any(shown_sample.reward is not None for shown_sample in shown_samples) else ""],
            rows,
            [2],
        )
        parts.append(
            f"<details{' open' if index == 0 else ''}><summary>{text(prompt, 300)}{ground_truth}</summary>"
            f"{body}</details>"
        )
    html = f"<h2>Samples over time</h2>{''.join(parts)}" if parts else ""
    return html + of_pairs.samples([sample for sample in run_log.samples if sample.role in PAIR_SIDES])


def data(run_log: RunLog) -> str:
    """The mixture as bars, the lengths, what was wrong with which rows, and rows with their loss mask."""
    data_report = run_log.data
    if not data_report:
        return ""
    cards = [_mixture(data_report), _lengths(data_report), of_pairs.sides(data_report)]
    html = f'<h2>Data</h2><div class="grid2">{"".join(card for card in cards if card)}</div>'
    return html + _issues(data_report) + _examples(data_report)


def _mixture(data_report: Mapping[str, Any]) -> str:
    parts = entries(data_report, "parts")
    if not parts:
        return ""
    totals = {key: sum(get_number(part, key) for part in parts) or 1.0 for key in ("rows", "tokens", "trained")}
    rows = []
    for part in parts:
        head = f'<b>{text(part.get("name", ""), 120)}</b> <span class="soft">{text(part.get("format", ""))}</span>'
        rows.append([head, "", ""])
        for key, name in (("rows", "rows"), ("tokens", "tokens"), ("trained", "trained tokens")):
            share = get_number(part, key) / totals[key]
            rows.append([f'<span class="soft">{name}</span>', bar(share), f"{get_number(part, key):,.0f}"])
        rows.append(
            [
                '<span class="soft">weight w<sub>s</sub></span>',
                bar(get_number(part, "weight"), "w"),
                f"{get_number(part, 'weight'):.4f}",
            ]
        )
    return (
        f'<div class="card"><h3>Mixture</h3><p class="soft">by {text(data_report.get("weighted_by", ""))}</p>'
        f"{table(['', 'share', ''], rows, [2])}<p "
        f'class="soft">{_epoch(data_report)}<br>{_eos_line(get_mapping(data_report, "ends"))}</p></div>'
    )


def _epoch(data_report: Mapping[str, Any]) -> str:
    rows, tokens, trained, steps = (
        f"{get_number(get_mapping(data_report, 'epoch'), key):,.0f}" for key in ("rows", "tokens", "trained", "steps")
    )
    validation = f"{get_number(data_report, 'validation_rows'):,.0f}"
    return (
        f"An epoch: {rows} rows, {tokens} tokens, {trained} of them trained, {steps} steps. {validation} rows to "
        f"validate with."
    )


def _eos_line(eos_stats: Mapping[str, Any]) -> str:
    if not eos_stats.get("trained"):
        return 'End token trained: <span class="no">no</span>.'
    tokens = get_mapping(eos_stats, "tokens")
    names = ", ".join(f"{text(name, 60)} ({get_number(tokens, name):,.0f} times)" for name in tokens)
    return f'End token trained: <span class="yes">yes</span>, {names}.'


def _lengths(data_report: Mapping[str, Any]) -> str:
    lengths = get_mapping(data_report, "lengths")
    edges = lengths.get("edges")
    counts = lengths.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1:
        return ""
    if not all(isinstance(value, int) for value in (*edges, *counts)):
        return ""
    limit = int(get_number(lengths, "limit"))
    over = int(get_number(lengths, "over"))
    names = (("median", "median"), ("95 % up to", "p95"), ("longest read", "longest"), ("limit", "limit"))
    summary = ", ".join(f"{name} {get_number(lengths, key):,.0f}" for name, key in names)
    return (
        f'<div class="card"><h3>Lengths in tokens</h3><p '
        f'class="soft">{summary}</p>{histogram(edges, counts, limit, over)}</div>'
    )


def _issues(data_report: Mapping[str, Any]) -> str:
    rows = []
    for issue in entries(data_report, "issues"):
        count = int(get_number(issue, "count"))
        locations = issue.get("locations")
        if isinstance(locations, list):
            where = ", ".join(map(str, locations))
        else:
            where = ""
        rows.append(
            [
                f'<span class="{"some" if count else "zero"}">{count:,}</span>',
                text(issue.get("description", ""), 300),
                text(issue.get("done", "")) if count else "",
                f'<span class="soft">{text(where, 700)}</span>',
            ]
        )
    if rows:
        return (
            f"<details><summary>Rows looked at</summary>{table(['rows', 'what', 'done', 'where'], rows, [0])}</details>"
        )
    return ""


def _examples(data_report: Mapping[str, Any]) -> str:
    parts = []
    for example in entries(data_report, "examples"):
        segments = [pair for pair in example.get("segments") or () if isinstance(pair, list) and len(pair) == 2]
        shown = "".join(
            f"<mark>{block(segment)}</mark>" if trained else block(segment) for trained, segment in segments
        )
        parts.append(f'<p class="soft">{text(example.get("location", ""))}</p><div class="text">{shown}</div>')
    title = 'Rows as the model reads them <span class="soft">what is marked is trained</span>'
    if parts:
        return f"<details><summary>{title}</summary>{''.join(parts)}</details>"
    return ""


def recipe(run_log: RunLog) -> str:
    """The recipe, complete."""
    if run_log.recipe:
        yaml_text = block(run_log.recipe, 60_000)
        return f"<h2>Recipe</h2><details><summary>recipe.yaml</summary><pre>{yaml_text}</pre></details>"
    return ""


def environment(run_log: RunLog) -> str:
    """Machine, versions, and the hash of the frozen base at both ends of the run."""
    started = run_log.started
    hashes = get_mapping(run_log.summary, "base_hash")
    rows: list[tuple[str, str]] = []
    if started is not None:
        rows += [
            ("device", text(started.device)),
            ("roles", text(_roles(started.roles))),
            ("reference", text(started.reference)),
            ("trained parameters", f"{started.trainable:,}"),
        ]
        rows += [(str(name), text(version)) for name, version in started.versions.items()]
    rows += [(name, text(run_log.base[name])) for name in ("revision", "bits") if run_log.base.get(name) is not None]
    rows.append(("began", text(_when(run_log.began))))
    if hashes:
        same = hashes.get("start") == hashes.get("end")
        rows.append(
            (
                "base hash",
                f'<span class="hash">{text(hashes.get("start"))}</span> at the start<br>'
                f'<span class="hash">{text(hashes.get("end"))}</span> at the end<br>'
                f'<span class="{"yes" if same else "no"}">{"unchanged" if same else "CHANGED"}</span>',
            )
        )
    return f'<h2>Environment</h2><div class="card">{pairs(rows)}</div>'


def notes(run_log: RunLog) -> str:
    """What the run said besides."""
    items = "".join(f"<li>{text(note, 600)}</li>" for note in run_log.notes)
    if run_log.notes:
        return f"<h2>Notes</h2><details><summary>{len(run_log.notes)} notes</summary><ul>{items}</ul></details>"
    return ""


def _roles(roles: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{role}: {' + '.join(map(str, stack)) or 'the base'}" for role, stack in roles.items())


def _when(moment: float) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return "unknown"
