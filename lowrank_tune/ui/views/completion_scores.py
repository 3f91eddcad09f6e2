"""Output of `lowrank-tune score PRESET|FILE`: verdicts and times of each reward, disagreements, and failures."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.evaluation.score_completions import CompletionScores, ResponseItem
from lowrank_tune.rewards.verdicts import Disagreement, find_disagreements, summarize_verdicts
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import number

SHOWN = 3
KINDS = ("pass", "fail", "graded", "error", "timeout")


def show(completion_scores: CompletionScores, title: str, console: Console) -> None:
    """Draws it."""
    done = len(completion_scores.scores)
    total = len(completion_scores.responses)
    _print(
        console,
        f"{escape_control_chars(title)}: {done:,} responses scored"
        + (f" of {total:,}, interrupted" if completion_scores.interrupted else ""),
    )
    for reason, dropped in completion_scores.dropped.items():
        _print(
            console,
            f"  {dropped.count:,} rows are none: {escape_control_chars(reason, 200)} "
            f"({escape_control_chars(', '.join(dropped.locations), 200)})",
        )
    if not completion_scores.scores:
        return
    console.print(_figures(completion_scores))
    for disagreement in find_disagreements(completion_scores.weighted, completion_scores.scores):
        _disagreement(completion_scores, disagreement, console)
    _failures(completion_scores, console)
    if (why := completion_scores.stop_reason()) is not None:
        _print(console, f"a run would stop: {escape_control_chars(why, 600)}")


def _print(console: Console, text: str) -> None:
    """In one line, however long: a terminal folds it, a file keeps it whole."""
    console.print(Text(text), soft_wrap=True)


def _figures(completion_scores: CompletionScores) -> Table:
    """A line a reward. Milliseconds of one completion: the median, one in twenty above, the longest."""
    stats = [
        summarize_verdicts(each.name, each.is_verifier, [scores[index] for scores in completion_scores.scores])
        for index, each in enumerate(completion_scores.weighted)
    ]
    kinds = [kind for kind in KINDS if any(each.counts.get(kind) for each in stats)]
    table = Table("reward", *kinds, "mean", "spread", "ms", "p95", "max", box=None)
    for each in stats:
        times = (f"{1e3 * seconds:.3g}" for seconds in (each.median_seconds, each.p95_seconds, each.max_seconds))
        counts = (f"{each.counts.get(kind, 0):,}" for kind in kinds)
        table.add_row(escape_control_chars(each.name, 40), *counts, number(each.mean), number(each.std), *times)
    return table


def _disagreement(completion_scores: CompletionScores, disagreement: Disagreement, console: Console) -> None:
    apart = len(disagreement.only_first) + len(disagreement.only_second)
    if disagreement.num_both_scored:
        share = f", {apart / disagreement.num_both_scored:.1%}"
    else:
        share = ""
    _print(
        console,
        f"\n`{disagreement.first}` and `{disagreement.second}` disagree on {apart:,} of "
        f"{disagreement.num_both_scored:,}{share}",
    )
    for who, other, numbers in (
        (disagreement.first, disagreement.second, disagreement.only_first),
        (disagreement.second, disagreement.first, disagreement.only_second),
    ):
        if numbers:
            _print(console, f"  correct by `{who}`, wrong by `{other}`: {len(numbers):,}")
        for index in numbers[:SHOWN]:
            _print(
                console,
                f"    {_where(completion_scores.responses[index])}: "
                f"{escape_control_chars(completion_scores.responses[index].reward_input.completion[-200:], 160)}",
            )


def _failures(completion_scores: CompletionScores, console: Console) -> None:
    """The responses on which a reward failed, with the reasons."""
    for index, weighted_reward in enumerate(completion_scores.weighted):
        failed = [
            (response, scores[index])
            for response, scores in zip(completion_scores.responses, completion_scores.scores, strict=False)
            if scores[index].value is None
        ]
        if failed:
            _print(
                console,
                f"\n`{weighted_reward.name}` failed on {len(failed):,}; a run would "
                f"{'stop' if weighted_reward.on_error == 'stop' else 'drop them'}",
            )
        for response, score in failed[:SHOWN]:
            _print(console, f"  {_where(response)}: {score.verdict}: {escape_control_chars(score.reason, 300)}")


def _where(response: ResponseItem) -> str:
    location = escape_control_chars(response.location.rpartition("/")[2], 60)
    if response.index > 1:
        return f"{location} no. {response.index}"
    return location
