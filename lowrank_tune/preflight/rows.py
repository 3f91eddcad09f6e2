"""The picture of rows and of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune import settings
from lowrank_tune.data import Census, Order, Prepared, Prompt, Template, TokenStore, census
from lowrank_tune.data.balance import contradicting, sides
from lowrank_tune.data.pairs import EQUAL
from lowrank_tune.data.report import EXAMPLES
from lowrank_tune.preflight.common import (
    HEARD,
    SHOWN_CHARACTERS,
    cut,
    dropped,
    ids_of,
    lengths_of,
    picked,
    too_few,
    weighted_by,
)
from lowrank_tune.preflight.picture import Ends, Epoch, Example, Part, Preflight, Trouble


def survey(recipe: settings.Recipe, data: Prepared, template: Template, heldout: Sequence[Prompt] = ()) -> Preflight:
    """The picture of loaded data."""
    counted = census(data.train, template.end_ids)
    ends = _ends(counted, template, data.train.together)
    parts, epoch = _mixture(recipe, data, counted)
    lengths = lengths_of(_all_lengths(data), data.report, recipe.data.max_length)
    return Preflight(
        report=data.report,
        template=template.describe(),
        weighted_by=weighted_by(recipe.data.train),
        parts=parts,
        lengths=lengths,
        troubles=tuple(_troubles(data, counted, template, heldout)),
        ends=ends,
        epoch=epoch,
        examples=tuple(_examples(data.train, template)),
        faults=tuple(_faults(recipe, data, ends)),
        sides=sides(data.train, counted) if data.train.together > 1 else None,
    )


def _mixture(recipe: settings.Recipe, data: Prepared, counted: Census) -> tuple[tuple[Part, ...], Epoch]:
    """The parts, and the first epoch exactly as the loop will draw it."""
    train, sources = data.train, data.report.train
    epoch = _drawn(recipe, train)
    rows = epoch[0] if epoch else np.zeros(0, np.int64)
    lengths, trained_of = train.unit_lengths, counted.trained.reshape(-1, train.together).sum(axis=1)
    source_of = train.unit_source_of[rows]

    def sums(values: NDArray[np.int64], of: NDArray[Any]) -> list[int]:
        return [int(value) for value in np.bincount(of, weights=values, minlength=len(sources))]

    inside = zip(
        *(sums(values, train.unit_source_of) for values in (np.ones(train.units, np.int64), lengths, trained_of)),
        strict=True,
    )
    in_epoch = zip(sums(lengths[rows], source_of), sums(trained_of[rows], source_of), strict=True)
    weights = [source.weight for source in recipe.data.train]
    parts = tuple(
        Part(
            told.name,
            told.format,
            told.read,
            told.used,
            told.golds,
            count,
            tokens,
            trained,
            count / max(1, train.units) if weight is None else weight,
            *drawn,
        )
        for told, weight, (count, tokens, trained), drawn in zip(sources, weights, inside, in_epoch, strict=True)
    )
    steps, all_steps = epoch[1:] if epoch else (0, 0)
    return parts, Epoch(len(rows), int(lengths[rows].sum()), int(trained_of[rows].sum()), steps, all_steps)


def _drawn(recipe: settings.Recipe, train: TokenStore) -> tuple[NDArray[np.int64], int, int] | None:
    """Rows (or pairs) and steps of the first epoch, and the steps of the run; None where the mixture cannot be
    drawn."""
    weights = [source.weight for source in recipe.data.train]
    if not len(train) or (weights[0] is not None and len(np.unique(train.source_of)) < len(weights)):
        return None
    order = Order(train.unit_lengths, train.unit_source_of, weights, recipe.train, recipe.seed)
    rows = np.concatenate([np.array(order.rows(step)) for step in range(order.steps_per_epoch)])
    return rows, order.steps_per_epoch, recipe.train.steps or order.steps_of(recipe.train.epochs or 1.0)


def _all_lengths(data: Prepared) -> NDArray[np.int64]:
    return np.concatenate([data.train.lengths, *([data.validation.lengths] if data.validation is not None else [])])


def _troubles(data: Prepared, counted: Census, template: Template, heldout: Sequence[Prompt]) -> list[Trouble]:
    """All that is looked for, found or not: that nothing was found is also news."""
    sources = (*data.report.train, *data.report.validation)
    truncated = tuple(place for source in sources for place in source.truncated_places)[:EXAMPLES]
    unended = _units(np.flatnonzero(counted.unended), data.train)
    found = [
        *dropped(sources, ("too long", "without a target", *([EQUAL] if data.train.together > 1 else []))),
        Trouble(
            "too long, without the oldest turns of the prompt"
            if data.train.together > 1
            else "too long, shortened to whole turns",
            sum(source.truncated for source in sources),
            "kept, shortened",
            truncated,
        ),
        Trouble("without an end token behind an answer", len(unended), "kept", _places(data.train, unended)),
        _duplicates(data),
        *([_contradicting(data)] if data.train.together > 1 else []),
        Trouble("in both splits", data.report.shared, "kept in both; the validation loss flatters", _shared(data)),
    ]
    return [*found, _known_questions(data.train, counted, template, heldout)] if heldout else found


def _places(rows: TokenStore, units: NDArray[Any]) -> tuple[str, ...]:
    return tuple(rows.place_of(int(unit) * rows.together) for unit in units[:EXAMPLES])


def _units(rows: NDArray[Any], store: TokenStore) -> NDArray[Any]:
    """The units that these rows belong to."""
    return np.unique(rows // store.together)


def _duplicates(data: Prepared) -> Trouble:
    """Equal conversations among the rows of `data.train`: those set aside from them for validation count too."""
    places: tuple[str, ...] = ()
    for rows in _of_train(data):
        order = np.argsort(rows.unit_keys, kind="stable")
        places += _places(rows, np.sort(order[1:][rows.unit_keys[order][1:] == rows.unit_keys[order][:-1]]))
    return Trouble(f"repeating an earlier {data.report.unit}", data.report.duplicates, "kept", places[:EXAMPLES])


def _of_train(data: Prepared) -> list[TokenStore]:
    """The parts of the rows of `data.train`: what is trained on, and what was set aside."""
    parts = (data.train, None if data.report.validation else data.validation)
    return [rows for rows in parts if rows is not None and len(rows)]


def _contradicting(data: Prepared) -> Trouble:
    """Pairs that stand in the data the other way round too."""
    parts = _of_train(data)
    where = contradicting(parts)
    places = [place for rows, units in zip(parts, where, strict=True) for place in _places(rows, units)]
    return Trouble(
        "contradicting: the same answers stand the other way round too",
        sum(map(len, where)),
        "kept; together they teach nothing",
        tuple(places[:EXAMPLES]),
    )


def _shared(data: Prepared) -> tuple[str, ...]:
    if data.validation is None or not data.report.shared:
        return ()
    return _places(data.validation, np.flatnonzero(np.isin(data.validation.unit_keys, data.train.unit_keys)))


def _known_questions(rows: TokenStore, counted: Census, template: Template, heldout: Sequence[Prompt]) -> Trouble:
    """Training rows that begin with a held-out question: its answer was seen."""
    asked = ids_of(heldout, template)
    # Rows whose prompt is as long as one of these, before any is looked at; both sides of a pair have the same.
    likely = np.flatnonzero(np.isin(counted.prompt, list({len(ids) for ids in asked})))
    asking = [row for row in likely if tuple(map(int, rows[int(row)].ids[: counted.prompt[row]])) in asked]
    known = _units(np.array(asking, dtype=np.int64), rows)
    return Trouble("asking a held-out question", len(known), HEARD, _places(rows, known))


def _ends(counted: Census, template: Template, together: int) -> Ends:
    unended = counted.unended.reshape(-1, together).sum(axis=1)
    tokens = {template.decode([token], marks=True): count for token, count in sorted(counted.ends.items())}
    return Ends(bool(counted.ends), tokens, int((unended == 0).sum()), len(unended))


def _examples(rows: TokenStore, template: Template) -> list[Example]:
    """The first row or pair of each source, then those that follow in the first one."""
    names = ("",) if rows.together == 1 else (", chosen", ", rejected")
    return [
        Example(rows.place_of(row) + name, int(rows.lengths[row]), rows.trained_of(row), _segments(rows, row, template))
        for unit in picked(rows.unit_source_of)
        for row, name in enumerate(names, start=unit * rows.together)
    ]


def _segments(rows: TokenStore, number: int, template: Template) -> tuple[tuple[bool, str], ...]:
    row, left = rows[number], SHOWN_CHARACTERS
    edges = [0, *(int(edge) + 1 for edge in np.flatnonzero(np.diff(np.asarray(row.says, dtype=np.int8)))), len(row.ids)]
    segments: list[tuple[bool, str]] = []
    for start, end in zip(edges, edges[1:], strict=False):
        text = template.decode([int(token) for token in row.ids[start:end]], marks=True)
        segments.append((bool(row.says[start]), cut(text, left)))
        left = max(200, left - len(text))
    return tuple(segments)


def _faults(recipe: settings.Recipe, data: Prepared, ends: Ends) -> list[str]:
    told = too_few(data.report, recipe)
    if data.report.train_rows and not ends.trained:
        told.append(
            "no end token is trained: the model would never learn to stop; the chat template closes no answer with one"
        )
    return told
