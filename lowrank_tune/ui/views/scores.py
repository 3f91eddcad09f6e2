"""Output of `lowrank-tune score`: scores of a reward model, or verdicts, times, disagreements and failures of
rewards."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev, quantiles

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.evaluation import CompletionScores, ResponseItem, ScoredResponse
from lowrank_tune.evaluation.validation import PairScores
from lowrank_tune.rewards.verdicts import Disagreement, find_disagreements, summarize_verdicts
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import number, percent

SHOWN = 3
KINDS = ("pass", "fail", "graded", "error", "timeout")
PAIRS = {
    "accuracy": ("the chosen answer scores higher", percent),
    "margin": ("chosen minus rejected, mean", number),
    "calibration_error": ("calibration error", number),
    "prefers_longer": ("prefers the longer answer", percent),
    "length_correlation": ("correlation of score and length", number),
}


def show_reward_model_scores(
    responses: Sequence[ScoredResponse],
    pairs: PairScores | None,
    console: Console,
) -> None:
    """Prints the distribution of the scores, the metrics of pairs, and the best and worst answers."""
    scores = [response.score for response in responses]
    figures = Table("", "", box=None, show_header=False)
    figures.add_row("answers scored", f"{len(scores):,}")
    figures.add_row("mean, spread", f"{number(fmean(scores))}, {number(pstdev(scores))}")
    if len(scores) > 1:
        figures.add_row("quartiles", ", ".join(number(value) for value in quantiles(scores, n=4)))
    if pairs is not None:
        metrics = pairs.metrics()
        for name, (label, write) in PAIRS.items():
            figures.add_row(label, write(metrics[name]))
    console.print(figures)
    table = Table(
        "score",
        "where",
        "asked",
        "answered",
        "tokens",
        show_lines=True,
        title="the best and the worst",
    )
    for response in _best_and_worst(responses):
        location = _location(response.location)
        if response.side:
            location = f"{location} {response.side}"
        table.add_row(
            number(response.score),
            location,
            Text(escape_control_chars(response.prompt, 300)),
            Text(escape_control_chars(response.text, 500)),
            str(response.tokens),
        )
    console.print(table)


def _best_and_worst(responses: Sequence[ScoredResponse]) -> list[ScoredResponse]:
    """Returns the best and the worst `SHOWN` responses, or all if they are few."""
    ranked = sorted(responses, key=lambda response: -response.score)
    if len(ranked) <= 2 * SHOWN:
        return ranked
    return ranked[:SHOWN] + ranked[-SHOWN:]


def show_completion_scores(
    result: CompletionScores,
    title: str,
    console: Console,
) -> None:
    """Prints the figures of each reward, their disagreements and failures, and whether a run would stop."""
    total = len(result.responses)
    progress = f"{len(result.scores):,} responses scored"
    if result.interrupted:
        progress = f"{progress} of {total:,}, interrupted"
    _print(console, f"{escape_control_chars(title)}: {progress}")
    for reason, dropped in result.dropped.items():
        locations = escape_control_chars(", ".join(dropped.locations), 200)
        _print(console, f"  {dropped.count:,} rows are left out: {escape_control_chars(reason, 200)} ({locations})")
    if not result.scores:
        return
    console.print(_verdict_table(result))
    for disagreement in find_disagreements(result.weighted, result.scores):
        _show_disagreement(result, disagreement, console)
    _show_failures(result, console)
    stop_reason = result.stop_reason()
    if stop_reason is not None:
        _print(console, f"a run would stop: {escape_control_chars(stop_reason, 600)}")


def _print(console: Console, text: str) -> None:
    """Prints one line of any length: a terminal wraps it, a file does not."""
    console.print(Text(text), soft_wrap=True)


def _verdict_table(result: CompletionScores) -> Table:
    """Returns a row for each reward. Times are milliseconds of one completion: median, 95th percentile, maximum."""
    summaries = []
    for index, reward in enumerate(result.weighted):
        reward_scores = [scores[index] for scores in result.scores]
        summaries.append(summarize_verdicts(reward.name, reward.is_verifier, reward_scores))
    kinds = [kind for kind in KINDS if any(summary.counts.get(kind) for summary in summaries)]
    table = Table(
        "reward",
        *kinds,
        "mean",
        "spread",
        "ms",
        "p95",
        "max",
        box=None,
    )
    for summary in summaries:
        counts = [f"{summary.counts.get(kind, 0):,}" for kind in kinds]
        seconds = (summary.median_seconds, summary.p95_seconds, summary.max_seconds)
        times = [f"{1e3 * value:.3g}" for value in seconds]
        name = escape_control_chars(summary.name, 40)
        table.add_row(
            name,
            *counts,
            number(summary.mean),
            number(summary.std),
            *times,
        )
    return table


def _show_disagreement(
    result: CompletionScores,
    disagreement: Disagreement,
    console: Console,
) -> None:
    """Prints how often two rewards disagree, with examples."""
    first, second = disagreement.first, disagreement.second
    count = len(disagreement.only_first) + len(disagreement.only_second)
    total = disagreement.num_both_scored
    share = f", {count / total:.1%}" if total else ""
    _print(console, f"\n`{first}` and `{second}` disagree on {count:,} of {total:,}{share}")
    for correct_by, wrong_by, indices in (
        (first, second, disagreement.only_first),
        (second, first, disagreement.only_second),
    ):
        if indices:
            _print(console, f"  correct by `{correct_by}`, wrong by `{wrong_by}`: {len(indices):,}")
        for index in indices[:SHOWN]:
            response = result.responses[index]
            end_of_text = escape_control_chars(response.reward_input.completion[-200:], 160)
            _print(console, f"    {_response_location(response)}: {end_of_text}")


def _show_failures(result: CompletionScores, console: Console) -> None:
    """Prints the first responses on which each reward failed, with the reasons."""
    for index, reward in enumerate(result.weighted):
        failed = []
        for response, scores in zip(result.responses, result.scores, strict=False):
            if scores[index].value is None:
                failed.append((response, scores[index]))
        if failed:
            reaction = "stop" if reward.on_error == "stop" else "drop them"
            _print(console, f"\n`{reward.name}` failed on {len(failed):,}; a run would {reaction}")
        for response, score in failed[:SHOWN]:
            reason = escape_control_chars(score.reason, 300)
            _print(console, f"  {_response_location(response)}: {score.verdict}: {reason}")


def _response_location(response: ResponseItem) -> str:
    location = _location(response.location)
    if response.index > 1:
        return f"{location} no. {response.index}"
    return location


def _location(location: str) -> str:
    """Returns file name and line."""
    return escape_control_chars(location.rpartition("/")[2], 60)
