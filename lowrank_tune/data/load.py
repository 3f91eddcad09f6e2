"""The door of this floor: from the data settings to rows to train on, rows to validate with, prompts, and a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune import settings
from lowrank_tune.data.chat import Template
from lowrank_tune.data.files import Raw
from lowrank_tune.data.formats import RowFault
from lowrank_tune.data.gold import find_gold
from lowrank_tune.data.report import Report
from lowrank_tune.data.sides import pair_of
from lowrank_tune.data.sources import TUTOR, read
from lowrank_tune.data.store import TokenStore
from lowrank_tune.data.tokenise import conversation, shape_of, tokenise
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Note
from lowrank_tune.types import Message


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows and what became of the others."""

    train: TokenStore
    validation: TokenStore | None
    report: Report


@dataclass(frozen=True)
class Prompt:
    """A question without its answer, the gold answer, and the row that it comes from."""

    messages: tuple[Message, ...]
    gold: str | None
    row: Mapping[str, Any]


def load(
    data: settings.Data,
    template: Template,
    seed: int,
    emit: Emit,
    cache: Path | None = None,
    judge: bool = True,
    pairs: bool = False,
) -> Prepared:
    """Reads, tokenises (or finds again) and splits. Raises `UserError`, before any training, where the data cannot be
    used.

    With `pairs` the rows are preference pairs, which are never parted. All that is counted are then pairs. Without
    `judge` rows that cannot be used are only reported, however many: a preflight shows all of it before it says no.
    """
    _check_weights(data.train)
    every = tokenise(data.train, data, template, seed, emit, cache, judge, pairs)
    validation = None
    train = every
    if data.validation:
        validation = tokenise(data.validation, data, template, seed, emit, cache, judge, pairs)
    elif data.validation_rows or data.validation_share:
        is_aside = aside(every.unit_keys, data.validation_rows or data.validation_share, seed)
        train = every.take_units(np.flatnonzero(~is_aside))
        validation = every.take_units(np.flatnonzero(is_aside)) if is_aside.any() else None
    weighted = [source for source, given in enumerate(data.train) if given.weight is not None]
    for source in weighted:
        if judge and not (train.source_of == source).any():
            raise UserError(
                f"{every.reports[source].name}: all of its rows went into the validation part; give it more rows or "
                f"no weight"
            )
    shared = int(np.isin(validation.unit_keys, train.unit_keys).sum()) if validation is not None else 0
    report = Report(
        train=tuple(replace(made, weight=given.weight) for made, given in zip(every.reports, data.train, strict=True)),
        validation=tuple(validation.reports) if validation is not None and data.validation else (),
        expected_tokens=data.expected_tokens,
        train_rows=train.units,
        validation_rows=0 if validation is None else validation.units,
        duplicates=every.units - len(np.unique(every.unit_keys)),
        shared=shared,
        mixture=_mixture(data.train, train),
    )
    if shared:
        emit(
            Note(
                level="warning",
                message=f"{shared} validation {report.unit}s also stand in the training {report.unit}s; the "
                f"validation loss "
                "will flatter",
            )
        )
    return Prepared(train, validation, report)


def prompts(source: settings.Source, count: int, seed: int, system: str | None = None) -> list[Prompt]:
    """Up to `count` prompts of a source, drawn with the seed. Rows that cannot be used are passed over."""
    if source.dataset in TUTOR:
        source = source.model_copy(update={"rows": source.rows or count})
    spare = count + count // 4 + 20  # some rows may be unusable
    wanted = min(source.rows or spare, spare)
    rows = read(source.model_copy(update={"rows": wanted}), seed)
    shape = shape_of(source, rows)
    found: list[Prompt] = []
    faults: list[str] = []
    for place, raw in rows:
        made = raw if isinstance(raw, RowFault) else _prompt(raw, source, shape, system)
        if isinstance(made, RowFault):
            faults.append(f"{place}: {made.reason}")
        else:
            found.append(made)
    if not found:
        raise UserError(f"{rows.name}: no row can serve as a prompt: {'; '.join(faults[:3])}")
    return found[:count]


def _prompt(raw: Raw, source: settings.Source, shape: str, system: str | None) -> Prompt | RowFault:
    """The prompt of a row; of a pair the gold answer stands in the chosen side."""
    if shape == "preference":
        pair = pair_of(raw, source, system)
        if isinstance(pair, RowFault):
            return pair
        return Prompt(
            pair.prompt, find_gold(raw, source.columns, source.gold, pair.chosen[-1].content, whole=True), raw
        )
    talk = conversation(raw, source, shape, system, answered=False)
    if isinstance(talk, RowFault):
        return talk
    return Prompt(talk.messages[:-1] if talk.messages[-1].role == "assistant" else talk.messages, talk.gold, raw)


def aside(keys: NDArray[np.uint64], wanted: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are set aside: a whole number of them, or about a share; at least one and never all. Equal
    conversations go to one side, so that a number may be missed where there are some."""
    unique, group_of, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    if len(unique) < 2:
        return np.zeros(len(keys), dtype=bool)
    ranking = np.argsort(_mixed(unique, seed), kind="stable")
    wanted = wanted if wanted >= 1 else wanted * len(keys)
    before = np.cumsum(sizes[ranking]) - sizes[ranking]
    groups = ranking[: min(max(1, int((before + sizes[ranking] / 2 <= wanted).sum())), len(unique) - 1)]
    is_aside = np.zeros(len(unique), dtype=bool)
    is_aside[groups] = True
    return np.asarray(is_aside[group_of])


def _mixed(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A different order of the keys for every seed (the finaliser of splitmix64, which wraps around)."""
    mixed = keys ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _check_weights(sources: Sequence[settings.Source]) -> None:
    given = [source.weight for source in sources if source.weight is not None]
    if given and (len(given) < len(sources) or not math.isclose(sum(given), 1.0, abs_tol=1e-6)):
        raise UserError(
            "data.train: either every source has a weight, and they sum to 1, or none has; "
            f"{len(given)} of {len(sources)} have one, and they sum to {sum(given):g}"
        )


def _mixture(sources: Sequence[settings.Source], train: TokenStore) -> str:
    if len(sources) == 1:
        return "one source"
    counts = np.bincount(train.source_of, minlength=len(sources))
    shares = [
        f"{source.dataset} {100 * (source.weight or counts[place] / len(train)):.3g} %"
        for place, source in enumerate(sources)
    ]
    return f"mixed by {'weight' if sources[0].weight is not None else 'row counts'}: {', '.join(shares)}"
