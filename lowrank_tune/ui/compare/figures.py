"""The figures of each side in words, a row for each: what was run, how it ended, and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

from lowrank_tune.ui import evals_view
from lowrank_tune.ui.compare.side import Side
from lowrank_tune.ui.figures import clock, number, percent
from lowrank_tune.ui.metrics import POLICY, WITHOUT_REFERENCE, WRITES
from lowrank_tune.ui.report.record import Points
from lowrank_tune.ui.report.sections import stages_of, stages_of_chain
from lowrank_tune.ui.report.words import inside, number_in

ENDS = 10  # a first or last value is the mean of a tenth of the run
ARROW = " \u2192 "


def rows(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """Label and a cell a side; what no side has is left out."""
    made = [(label, [write(side) for side in sides]) for label, write in ROWS]
    return [(label, cells) for label, cells in [*made, *_evaluations(sides)] if any(cells)]


def _evaluations(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """The last voice of each side's newest evaluation: its figures with their intervals, and what they are of."""
    told = [dict(evals_view.of_last_voice(side.evaluation)) if side.evaluation is not None else {} for side in sides]
    names = dict.fromkeys(name for each in told for name in each)
    return [(name, [each.get(name, "") for each in told]) for name in names]


def heldout(side: Side) -> dict[str, dict[str, float]]:
    """Held-out figures of the base and of each stage, what was measured first standing first."""
    found = stages_of_chain(side.chain) if side.chain is not None else stages_of(side.last)
    return {who: stats for who, stats in found.items() if who != POLICY}


def _algorithm(side: Side) -> str:
    return ARROW.join(str(record.started.algorithm) for record in side.records if record.started is not None)


def _base(side: Side) -> str:
    return next((str(record.started.model) for record in side.records if record.started is not None), "")


def _ended(side: Side) -> str:
    if side.last.ended is not None and inside(side.last.summary, "hacking").get("ended") is True:
        return f"{side.status}, early"
    return side.status


def _steps(side: Side) -> str:
    last = side.last
    earlier = "".join(f"{record.step:,} + " for record in side.records[:-1])
    return f"{earlier}{last.step:,}" + (
        f" of {last.started.steps:,}" if last.started is not None and last.step != last.started.steps else ""
    )


def _seconds(side: Side) -> str:
    return clock(
        sum(record.ended.seconds if record.ended is not None else record.last - record.began for record in side.records)
    )


def _measured(which: int, key: str, write: Callable[[float], str], named: bool = False) -> Callable[[Side], str]:
    """A held-out figure of the first (0) or the last (-1) who was asked; of the last only where somebody was asked
    before."""

    def told(side: Side) -> str:
        found = [(who, stats[key]) for who, stats in heldout(side).items() if key in stats]
        if not found or (which == -1 and len(found) < 2):
            return ""
        return write(found[which][1]) + (f" ({found[which][0]})" if named else "")

    return told


def _passes(side: Side) -> str:
    found = [
        (key, value)
        for stats in list(heldout(side).values())[1:]
        for key, value in stats.items()
        if key.startswith("pass_at_")
    ]
    return f"{percent(found[-1][1])} (of {found[-1][0][8:]})" if found else ""


def _greedy(side: Side) -> str:
    points = side.points("heldout_exact")
    if not points:
        return ""
    best = max(points, key=lambda step: (points[step], step))
    return f"{percent(points[best])} (step {best:,})"


def _pairs(side: Side) -> str:
    scored, checks = inside(side.last.summary, "heldout_pairs"), side.points("validation_accuracy")
    if (
        side.last.started is None
        or side.last.started.algorithm not in ("reward", "dpo")
        or not (checks or "accuracy" in scored)
    ):
        return ""
    return percent(number_in(scored, "accuracy", list(checks.values())[-1] if checks else 0.0))


def _best_loss(side: Side) -> str:
    points = side.points("validation_loss")
    if not points:
        return ""
    best = min(points, key=lambda step: points[step])
    return f"{number(points[best])} (step {best:,})"


def _went(name: str, write: Callable[[float], str] = number) -> Callable[[Side], str]:
    """The first and the last tenth of a curve."""

    def told(side: Side) -> str:
        values = list(side.points(name).values())
        part = max(1, len(values) // ENDS)
        return f"{write(fmean(values[:part]))}{ARROW}{write(fmean(values[-part:]))}" if values else ""

    return told


def _loss(side: Side) -> str:
    """Where completions are rewarded it says nothing."""
    return "" if side.last.started is not None and side.last.started.algorithm in WRITES else _went("loss")(side)


def _kl(side: Side) -> str:
    if side.last.started is not None and side.last.started.algorithm in WITHOUT_REFERENCE:
        return ""
    values = list(side.points("kl").values())
    return number(fmean(values[-max(1, len(values) // ENDS) :])) if values else ""


def _speed(side: Side) -> str:
    values = _all(side.points("tokens_per_second"))
    return f"{median(values):,.0f}" if values else ""


def _memory(side: Side) -> str:
    values = [value for record in side.records for value in _all(record.series.get("memory_gib", {}))]
    return f"{max(values):.1f} GiB" if values else ""


def _all(points: Points) -> list[float]:
    return [value for value in points.values() if value == value]


def _warnings(side: Side) -> str:
    count = sum(len(record.warnings) for record in side.records)
    return str(count) if count else ""


def _hacking(side: Side) -> str:
    """Whether the run said that its reward pays for something else."""
    spoke = inside(side.last.summary, "hacking").get("step")
    return f"said at step {spoke}" if isinstance(spoke, int) else ""


TOKENS = "{:.1f}".format
ROWS: tuple[tuple[str, Callable[[Side], str]], ...] = (
    ("algorithm", _algorithm),
    ("base", _base),
    ("ended", _ended),
    ("steps", _steps),
    ("time", _seconds),
    ("held-out exact, before", _measured(0, "exact", percent, named=True)),
    ("held-out exact, after", _measured(-1, "exact", percent, named=True)),
    ("one of several exact", _passes),
    ("best while training", _greedy),
    ("held-out pairs right", _pairs),
    ("validation loss, best", _best_loss),
    ("reward", _went("reward")),
    ("KL to reference, end", _kl),
    ("loss", _loss),
    ("tokens an answer, before", _measured(0, "length", TOKENS)),
    ("tokens an answer, after", _measured(-1, "length", TOKENS)),
    ("tokens a completion", _went("length", TOKENS)),
    ("tokens a second", _speed),
    ("peak memory", _memory),
    ("reward hacking", _hacking),
    ("warnings", _warnings),
)
