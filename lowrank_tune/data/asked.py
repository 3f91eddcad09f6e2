"""Prompts that completions are drawn for: read whole, with the rows that they come from, and which of them make up each
step."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune import settings
from lowrank_tune.data.chat import Template
from lowrank_tune.data.files import Raw
from lowrank_tune.data.formats import RowFault
from lowrank_tune.data.mixture import Order
from lowrank_tune.data.report import Report, SourceReport
from lowrank_tune.data.sources import Place, read
from lowrank_tune.data.store import talk_key
from lowrank_tune.data.tokenise import conversation, shape_of, too_few
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Note, Progress
from lowrank_tune.types import Message

TOLD = 2048  # rows between two reports of progress
NO_GOLD = "no gold answer, which a reward compares with"
OTHERS = 3  # a tag beside those of `mixture`, which keeps the random streams apart


@dataclass(frozen=True)
class Asked:
    """A prompt as ids and as a person reads it, the gold answer where there is one, and the row that it comes from."""

    ids: Sequence[int]
    text: str
    gold: str | None
    row: Mapping[str, Any]
    answer: str | None = None
    """The row's own answer, where it has one."""


@dataclass(frozen=True)
class AskedReport(Report):
    """What became of the rows where only their prompts are used: all that is counted are prompts, and tokens are
    theirs."""

    @property
    def unit(self) -> str:
        return "prompt"

    def lines(self) -> list[str]:
        """As sentences, one a source and one for the whole."""
        told = []
        for source in self.train:
            line = (
                f"{source.name} ({source.format}): prompts of {source.used} of {source.read} rows, "
                f"{source.tokens} tokens, "
            )
            line += f"{source.golds} with a gold answer"
            told.append(line + (f"; dropped {source.reasons()}" if source.dropped else ""))
        repeated = f", {self.duplicates} of them repeat an earlier one" if self.duplicates else ""
        return [*told, f"{self.train_rows} prompts to draw completions for{repeated}; {self.mixture}"]


@dataclass(frozen=True)
class AskedSet:
    """The prompts of all sources, in their order: `source_of` (N,), `lengths` (N,) in tokens, and where the row of each
    stands."""

    asked: list[Asked]
    places: list[Place]
    source_of: NDArray[np.int32]
    lengths: NDArray[np.int64]
    report: AskedReport

    def __len__(self) -> int:
        return len(self.asked)


class AskedOrder(Order):
    """Which prompts make up each step, and which others can take the place of those that teach nothing."""

    def __init__(self, found: AskedSet, data: settings.Data, train: settings.Train, seed: int) -> None:
        given = [source.weight for source in data.train]
        by_prompts = train.model_copy(
            update={"rows_per_step": train.prompts_per_step, "tokens_per_step": None, "length_window": 1}
        )
        super().__init__(found.lengths, found.source_of, given, by_prompts, seed)
        counts = np.bincount(found.source_of, minlength=len(given))
        share_of = np.array(
            [1.0 if weight is None else weight / count for weight, count in zip(given, counts, strict=True)]
        )
        self._shares = share_of[found.source_of]

    def others(self, step: int, draw: int, count: int) -> list[int]:
        """`count` prompts that are not of this step, by the weights of the sources; its own again only where there are
        no more others.

        A pure function of the seed, the step and the draw.
        """
        rng = self._random(OTHERS, step, draw)
        own = np.array(self.rows(step))
        # The smallest of exponential times at these rates: drawn by weight, each at most once.
        times = rng.exponential(size=len(self._shares)) / self._shares
        times[own] += times.max() + 1.0
        queue = np.argsort(times, kind="stable")
        return [int(queue[place % len(queue)]) for place in range(count)]


def asked_order(found: AskedSet, data: settings.Data, train: settings.Train, seed: int) -> AskedOrder:
    """The order of these prompts, `train.prompts_per_step` a step."""
    return AskedOrder(found, data, train, seed)


def load_asked(
    data: settings.Data,
    template: Template,
    seed: int,
    emit: Emit,
    judge: bool = True,
    needs_gold: bool = False,
    unusable: Callable[[Asked], str | None] | None = None,
) -> AskedSet:
    """The prompts of all training sources; with `needs_gold` those alone that have a gold answer to compare with.
    `unusable` says of a row why no reward could judge by it.

    Raises `UserError` where too many rows of one source give none. Without `judge` these rows are only reported,
    however many.
    """
    asked: list[Asked] = []
    places: list[Place] = []
    source_of: list[int] = []
    keys: set[int] = set()
    reports: list[SourceReport] = []
    for number, source in enumerate(data.train):
        report = _load_one(source, data, template, seed, emit, needs_gold, unusable, asked, places, keys)
        if judge:
            report.check(data.max_rejected_share)
        if short := too_few(source, report):
            emit(Note(message=short, level="warning"))
        source_of += [number] * report.used
        reports.append(report)
    lengths = np.array([len(one.ids) for one in asked], dtype=np.int64)
    told = AskedReport(
        tuple(reports), train_rows=len(asked), duplicates=len(asked) - len(keys), mixture=_mixture(data.train, reports)
    )
    return AskedSet(asked, places, np.array(source_of, dtype=np.int32), lengths, told)


def _load_one(
    source: settings.Source,
    data: settings.Data,
    template: Template,
    seed: int,
    emit: Emit,
    needs_gold: bool,
    unusable: Callable[[Asked], str | None] | None,
    asked: list[Asked],
    places: list[Place],
    keys: set[int],
) -> SourceReport:
    """Adds the prompts of one source to those of the others."""
    rows = read(source, seed)
    shape = shape_of(source, rows, pairs=False)
    emit(Note(message=f"{rows.name}: {len(rows)} rows of the shape `{shape}`"))
    report = SourceReport(rows.name, shape, weight=source.weight)
    own: set[int] = set()
    for place, raw in chain.from_iterable(rows.filled(lambda: report.used)):
        if report.read % TOLD == 0:
            emit(Progress(what=f"reading the prompts of {rows.name}", done=report.read, total=len(rows)))
        report.read += 1
        made = raw if isinstance(raw, RowFault) else _asked(raw, source, shape, data, template, report)
        if not isinstance(made, RowFault) and needs_gold and made[0].gold is None:
            made = RowFault(NO_GOLD)
        if not isinstance(made, RowFault) and unusable is not None and (why := unusable(made[0])) is not None:
            made = RowFault(why)
        if isinstance(made, RowFault):
            report.drop(made.reason, str(place))
            continue
        one, key = made
        _count(report, one, key in own)
        own.add(key)
        asked.append(one)
        places.append(place)
    keys |= own
    emit(Progress(what=f"reading the prompts of {rows.name}", done=report.read, total=len(rows)))
    assert report.used + report.rejected == report.read
    return report


def _count(report: SourceReport, one: Asked, is_known: bool) -> None:
    report.used += 1
    report.golds += one.gold is not None
    report.tokens += len(one.ids)
    report.duplicates += is_known


def _asked(
    raw: Raw, source: settings.Source, shape: str, data: settings.Data, template: Template, report: SourceReport
) -> tuple[Asked, int] | RowFault:
    """The prompt of a row and a number for it, or why it gives none."""
    talk = conversation(raw, source, shape, data.system, answered=False)
    if isinstance(talk, RowFault):
        return talk
    messages = talk.messages[:-1] if talk.messages[-1].role == "assistant" else talk.messages
    ids = _ids(messages, template)
    if isinstance(ids, RowFault):
        return ids
    report.longest = max(report.longest, len(ids))
    if len(ids) > data.max_prompt_length:
        return RowFault(f"longer than data.max_prompt_length ({data.max_prompt_length} tokens)")
    # An array, for a list of as many numbers is nine times as large.
    answer = talk.messages[-1].content if talk.messages[-1].role == "assistant" else None
    return Asked(array("i", ids), messages[-1].content, talk.gold, raw, answer), talk_key(messages)


def _ids(messages: Sequence[Message], template: Template) -> list[int] | RowFault:
    """What the base reads, or why it cannot be asked this: what `Template.spoils` says, for half the time of asking
    both."""
    try:
        return template.prompt(messages)
    except UserError as error:
        return error.__cause__ if isinstance(error.__cause__, RowFault) else RowFault(str(error))


def _mixture(sources: Sequence[settings.Source], reports: Sequence[SourceReport]) -> str:
    if len(sources) == 1:
        return "one source"
    total = max(1, sum(report.used for report in reports))
    shares = [
        f"{source.dataset} {100 * (source.weight or report.used / total):.3g} %"
        for source, report in zip(sources, reports, strict=True)
    ]
    return f"mixed by {'weight' if sources[0].weight is not None else 'prompt counts'}: {', '.join(shares)}"
