"""What `lowrank-tune verify` prints: how each reward judged and how fast, where the judges disagree, and what could not
be judged."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.rewards.verdicts import Clash, clashes, verdicts
from lowrank_tune.ui import inert
from lowrank_tune.ui.figures import number
from lowrank_tune.verify import Response, Verified

SHOWN = 3
KINDS = ("pass", "fail", "graded", "error", "timeout")


def show(found: Verified, title: str, console: Console) -> None:
    """Draws it."""
    done, total = len(found.rows), len(found.responses)
    _say(
        console,
        f"{inert(title)}: {done:,} responses judged" + (f" of {total:,}, interrupted" if found.interrupted else ""),
    )
    for reason, gone in found.dropped.items():
        _say(console, f"  {gone.count:,} rows are none: {inert(reason, 200)} ({inert(', '.join(gone.places), 200)})")
    if not found.rows:
        return
    console.print(_figures(found))
    for clash in clashes(found.weighted, found.rows):
        _clash(found, clash, console)
    _failures(found, console)
    if (why := found.stops()) is not None:
        _say(console, f"a run would stop: {inert(why, 600)}")


def _say(console: Console, sentence: str) -> None:
    """In one line, however long: a terminal folds it, a file keeps it whole."""
    console.print(Text(sentence), soft_wrap=True)


def _figures(found: Verified) -> Table:
    """A line a reward. Milliseconds of one completion: the median, one in twenty above, the longest."""
    told = [
        verdicts(each.name, each.reward.judges, [scores[place] for scores in found.rows])
        for place, each in enumerate(found.weighted)
    ]
    kinds = [kind for kind in KINDS if any(each.counts.get(kind) for each in told)]
    table = Table("reward", *kinds, "mean", "spread", "ms", "p95", "max", box=None)
    for each in told:
        times = (f"{1e3 * seconds:.3g}" for seconds in (each.median_seconds, each.p95_seconds, each.longest_seconds))
        counts = (f"{each.counts.get(kind, 0):,}" for kind in kinds)
        table.add_row(inert(each.name, 40), *counts, number(each.mean), number(each.spread), *times)
    return table


def _clash(found: Verified, clash: Clash, console: Console) -> None:
    apart = len(clash.only_one) + len(clash.only_other)
    share = f", {apart / clash.both_told:.1%}" if clash.both_told else ""
    _say(console, f"\n`{clash.one}` and `{clash.other}` disagree on {apart:,} of {clash.both_told:,}{share}")
    for who, other, numbers in ((clash.one, clash.other, clash.only_one), (clash.other, clash.one, clash.only_other)):
        if numbers:
            _say(console, f"  right by `{who}`, wrong by `{other}`: {len(numbers):,}")
        for place in numbers[:SHOWN]:
            _say(
                console,
                f"    {_where(found.responses[place])}: {inert(found.responses[place].item.completion[-200:], 160)}",
            )


def _failures(found: Verified, console: Console) -> None:
    """The responses on which a reward failed, with the reasons."""
    for place, each in enumerate(found.weighted):
        lost = [
            (response, scores[place])
            for response, scores in zip(found.responses, found.rows, strict=False)
            if scores[place].value is None
        ]
        if lost:
            _say(
                console,
                f"\n`{each.name}` failed on {len(lost):,}; a run would "
                f"{'stop' if each.on_error == 'stop' else 'drop them'}",
            )
        for response, score in lost[:SHOWN]:
            _say(console, f"  {_where(response)}: {score.verdict}: {inert(score.reason, 300)}")


def _where(response: Response) -> str:
    place = inert(response.place.rpartition("/")[2], 60)
    return f"{place} no. {response.number}" if response.number > 1 else place
