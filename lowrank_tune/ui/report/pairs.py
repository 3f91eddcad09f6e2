"""The parts of the page that are about pairs: what the trained adapter thinks of held-out ones, and what the sides
differ in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_tune.events import SampleLogged
from lowrank_tune.ui.formatting import percent, signed
from lowrank_tune.ui.metrics import PAIR_SIDES
from lowrank_tune.ui.report.charts import bar, format_tick
from lowrank_tune.ui.report.html import block, entries, get_mapping, get_number, table, text
from lowrank_tune.ui.report.plots import histogram_pair, reliability, scatter
from lowrank_tune.ui.report.run_log import RunLog

LEGEND = (
    '<div class="legend"><span><i class="key chosen"></i>chosen</span><span><i class="key '
    'rejected"></i>rejected</span></div>'
)
MAX_POINTS = 24


def scores(run_log: RunLog) -> str:
    """How far the scores of the held-out pairs can be believed, how they are spread, and whether they follow length."""
    pair_scores = run_log.scores
    sides = {side: _floats(pair_scores, side) for side in PAIR_SIDES}
    tokens = {side: _floats(pair_scores, f"{side}_tokens") for side in PAIR_SIDES}
    if not pair_scores or not any(sides.values()):
        return ""
    score_name = "score" if _is_reward(run_log) else "implicit reward"
    bins = [
        (get_number(bucket, "confidence"), get_number(bucket, "accuracy"), int(get_number(bucket, "pairs")))
        for bucket in entries(pair_scores, "reliability")
    ]
    bins = [bucket for bucket in bins if 0.5 <= bucket[0] <= 1 and 0 <= bucket[1] <= 1 and bucket[2] > 0]
    points = {side: list(zip(tokens[side], sides[side], strict=False)) for side in PAIR_SIDES}
    figures = get_mapping(pair_scores, "metrics")
    cards = [
        _card(
            "Reliability",
            "how often a pair is right, by how sure the model is of it, with the number of pairs; calibration error "
            f"{_figure_text(figures, 'calibration_error')}",
            reliability(bins),
        ),
        _card(
            f"{score_name.capitalize()} of both sides",
            "answers by what they are worth to the model",
            histogram_pair(sides),
            LEGEND,
        ),
        _card(
            f"{score_name.capitalize()} by length",
            f"tokens of an answer; correlation {_correlation(figures)}, the longer one is preferred in "
            f"{_figure_text(figures, 'prefers_longer')} of the pairs",
            scatter(points),
            LEGEND,
        ),
        _figures(figures, score_name),
    ]
    if _is_reward(run_log):
        title = "Scores of held-out pairs"
    else:
        title = "Implicit rewards of held-out pairs"
    return (
        f'<h2>{title} <span class="soft">{get_number(pair_scores, "pairs"):,.0f} pairs, the final adapter</span></h2>'
        f'<div class="grid2">{"".join(card for card in cards if card)}</div>'
    )


def _is_reward(run_log: RunLog) -> bool:
    return run_log.started is not None and run_log.started.algorithm == "reward"


def _card(title: str, words: str, svg: str, legend: str = "") -> str:
    if svg:
        return f'<div class="card"><h3>{text(title)}</h3><p class="soft">{text(words)}</p>{svg}{legend}</div>'
    return ""


def _figures(figures: Mapping[str, Any], score_name: str) -> str:
    names = (
        ("accuracy", "pairs whose chosen answer is ahead"),
        ("margin", f"mean {score_name} of the chosen above the rejected"),
        ("calibration_error", "calibration error: how far confidence is off, on average"),
        ("length_correlation", f"correlation of {score_name} and length"),
        ("prefers_longer", "pairs where the longer answer is ahead"),
    )
    rows = [[text(words), _figure_text(figures, key)] for key, words in names if key in figures]
    if rows:
        return f'<div class="card"><h3>In figures</h3>{table(["", ""], rows, [1])}</div>'
    return ""


def _figure_text(figures: Mapping[str, Any], key: str) -> str:
    value = get_number(figures, key, math.nan)
    if not math.isfinite(value):
        return "unknown"
    if key == "length_correlation":
        return _correlation(figures)
    if key == "margin":
        return format_tick(value)
    return percent(value)


def _correlation(figures: Mapping[str, Any]) -> str:
    value = get_number(figures, "length_correlation", math.nan)
    if math.isfinite(value):
        return f"{value:+.2f}"
    return "unknown"


def _floats(pair_scores: Mapping[str, Any], name: str) -> list[float]:
    """The numbers of a list that anyone may have edited; none where one of them is no finite number."""
    values = pair_scores.get(name)
    if not isinstance(values, list) or not all(
        isinstance(value, (int, float)) and abs(value) < 1e30 for value in values
    ):
        return []
    return [float(value) for value in values]


def samples(logged_samples: Sequence[SampleLogged]) -> str:
    """Held-out pairs, both answers side by side, and how their scores went."""
    history_by_pair: dict[tuple[str, str, str], list[tuple[SampleLogged, SampleLogged]]] = {}
    for chosen, rejected in zip(logged_samples, logged_samples[1:], strict=False):
        if (chosen.role, rejected.role) == ("chosen", "rejected") and chosen.prompt == rejected.prompt:
            history_by_pair.setdefault(
                (str(chosen.prompt), str(chosen.completion), str(rejected.completion)), []
            ).append((chosen, rejected))
    parts = []
    for index, ((prompt, *answers), history) in enumerate(history_by_pair.items()):
        every = max(1, -(-len(history) // MAX_POINTS))
        rows = [
            ["", *(f'<div class="text">{block(answer, 1500)}</div>' for answer in answers), ""],
            *(
                [
                    text(f"step {chosen_sample.step:,}"),
                    _score(chosen_sample),
                    _score(rejected_sample),
                    _verdict(chosen_sample, rejected_sample),
                ]
                for chosen_sample, rejected_sample in [*history[:-1:every], history[-1]]
            ),
        ]
        body = table(["", "chosen", "rejected", ""], rows)
        parts.append(f"<details{' open' if index == 0 else ''}><summary>{text(prompt, 300)}</summary>{body}</details>")
    if parts:
        return f"<h2>Pairs and their scores over time</h2>{''.join(parts)}"
    return ""


def _score(sample: SampleLogged) -> str:
    if not isinstance(sample.reward, (int, float)):
        return ""
    return signed(sample.reward)


def _verdict(chosen: SampleLogged, rejected: SampleLogged) -> str:
    if not isinstance(chosen.reward, (int, float)) or not isinstance(rejected.reward, (int, float)):
        return ""
    right = chosen.reward > rejected.reward
    if right:
        return '<span class="yes">&#10003; right</span>'
    return '<span class="no">&#10007; wrong</span>'


def sides(data: Mapping[str, Any]) -> str:
    """How the sides of the training pairs differ in length: what a model could learn instead of quality."""
    side_stats = get_mapping(data, "sides")
    count = get_number(side_stats, "pairs")
    if not count:
        return ""
    rows = [
        [name, bar(get_number(side_stats, key) / count), percent(get_number(side_stats, key) / count)]
        for name, key in (("chosen is longer", "longer"), ("chosen is shorter", "shorter"), ("equally long", "equal"))
    ]
    means = [f"{get_number(side_stats, side):,.1f}" for side in PAIR_SIDES]
    words = (
        f"{count:,.0f} pairs; on average {means[0]} tokens chosen, {means[1]} rejected; "
        f"{get_number(side_stats, 'margins'):,.0f} have a margin"
    )
    return (
        f'<div class="card"><h3>Sides of the pairs</h3><p '
        f'class="soft">{words}</p>{table(["", "share", ""], rows, [2])}</div>'
    )
