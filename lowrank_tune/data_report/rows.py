"""The picture of rows and of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import (
    BatchSampler,
    ChatTemplate,
    Prompt,
    TokenizedDataset,
    TokenizedSplits,
    TokenStats,
    compute_token_stats,
)
from lowrank_tune.data.preference_pairs import EQUAL_ANSWERS
from lowrank_tune.data.report import EXAMPLES
from lowrank_tune.data.stats import contradictory_pairs, pair_balance
from lowrank_tune.data_report.common import (
    LEAKAGE_NOTE,
    SHOWN_CHARACTERS,
    dropped_rows,
    example_rows,
    heldout_ids,
    invalid_sources,
    lengths_of,
    truncate_middle,
    weighted_by,
)
from lowrank_tune.data_report.report import DataIssue, DataReport, EosStats, Epoch, Example, MixturePart


def report_rows(
    recipe: RecipeConfig,
    data: TokenizedSplits,
    template: ChatTemplate,
    heldout: Sequence[Prompt] = (),
) -> DataReport:
    """The picture of loaded data."""
    stats = compute_token_stats(data.train, template.end_ids)
    eos_stats = _eos_stats(stats, template, data.train.rows_per_unit)
    parts, epoch = _mixture(recipe, data, stats)
    lengths = lengths_of(_all_lengths(data), data.report, recipe.data.max_length)
    return DataReport(
        report=data.report,
        template=template.describe(),
        weighted_by=weighted_by(recipe.data.train),
        parts=parts,
        lengths=lengths,
        issues=tuple(_issues(data, stats, template, heldout)),
        ends=eos_stats,
        epoch=epoch,
        examples=tuple(_examples(data.train, template)),
        faults=tuple(_fatal_problems(recipe, data, eos_stats)),
        sides=pair_balance(data.train, stats) if data.train.rows_per_unit > 1 else None,
    )


def _mixture(recipe: RecipeConfig, data: TokenizedSplits, stats: TokenStats) -> tuple[tuple[MixturePart, ...], Epoch]:
    """The parts, and the first epoch exactly as the loop will draw it."""
    train = data.train
    sources = data.report.train
    epoch = _sample_epoch(recipe, train)
    rows = epoch[0] if epoch else np.zeros(0, np.int64)
    lengths = train.unit_lengths
    trained_of = stats.trained.reshape(-1, train.rows_per_unit).sum(axis=1)
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
        MixturePart(
            report.name,
            report.format,
            report.read,
            report.used,
            report.ground_truths,
            count,
            tokens,
            trained,
            count / max(1, train.units) if weight is None else weight,
            *drawn,
        )
        for report, weight, (count, tokens, trained), drawn in zip(sources, weights, inside, in_epoch, strict=True)
    )
    steps, all_steps = epoch[1:] if epoch else (0, 0)
    return parts, Epoch(len(rows), int(lengths[rows].sum()), int(trained_of[rows].sum()), steps, all_steps)


def _sample_epoch(recipe: RecipeConfig, train: TokenizedDataset) -> tuple[NDArray[np.int64], int, int] | None:
    """Rows (or pairs) and steps of the first epoch, and the steps of the run; None where the mixture cannot be
    drawn."""
    weights = [source.weight for source in recipe.data.train]
    if not len(train) or (weights[0] is not None and len(np.unique(train.source_of)) < len(weights)):
        return None
    sampler = BatchSampler(train.unit_lengths, train.unit_source_of, weights, recipe.train, recipe.seed)
    rows = np.concatenate([np.array(sampler.rows(step)) for step in range(sampler.steps_per_epoch)])
    return (
        rows,
        sampler.steps_per_epoch,
        recipe.train.max_steps or sampler.steps_of(recipe.train.num_train_epochs or 1.0),
    )


def _all_lengths(data: TokenizedSplits) -> NDArray[np.int64]:
    return np.concatenate([data.train.lengths, *([data.validation.lengths] if data.validation is not None else [])])


def _issues(
    data: TokenizedSplits,
    stats: TokenStats,
    template: ChatTemplate,
    heldout: Sequence[Prompt],
) -> list[DataIssue]:
    """All that is looked for, found or not: that nothing was found is also news."""
    sources = (*data.report.train, *data.report.validation)
    truncated = tuple(location for source in sources for location in source.truncated_locations)[:EXAMPLES]
    unended = _units(np.flatnonzero(stats.unended), data.train)
    issues = [
        *dropped_rows(
            sources, ("too long", "without a target", *([EQUAL_ANSWERS] if data.train.rows_per_unit > 1 else []))
        ),
        DataIssue(
            "too long, without the oldest turns of the prompt"
            if data.train.rows_per_unit > 1
            else "too long, shortened to whole turns",
            sum(source.truncated for source in sources),
            "kept, shortened",
            truncated,
        ),
        DataIssue("without an end token behind an answer", len(unended), "kept", _locations(data.train, unended)),
        _duplicates(data),
        *([_contradictory_pairs(data)] if data.train.rows_per_unit > 1 else []),
        DataIssue(
            "in both splits",
            data.report.shared,
            "kept in both; the validation loss flatters",
            _split_overlap(data),
        ),
    ]
    if heldout:
        return [*issues, _heldout_leakage(data.train, stats, template, heldout)]
    return issues


def _locations(rows: TokenizedDataset, units: NDArray[Any]) -> tuple[str, ...]:
    return tuple(rows.row_location(int(unit) * rows.rows_per_unit) for unit in units[:EXAMPLES])


def _units(rows: NDArray[Any], store: TokenizedDataset) -> NDArray[Any]:
    """The units that these rows belong to."""
    return np.unique(rows // store.rows_per_unit)


def _duplicates(data: TokenizedSplits) -> DataIssue:
    """Equal conversations among the rows of `data.train`: those set aside from them for validation count too."""
    locations: tuple[str, ...] = ()
    for rows in _train_splits(data):
        order = np.argsort(rows.unit_hashes, kind="stable")
        locations += _locations(rows, np.sort(order[1:][rows.unit_hashes[order][1:] == rows.unit_hashes[order][:-1]]))
    return DataIssue(f"repeating an earlier {data.report.unit}", data.report.duplicates, "kept", locations[:EXAMPLES])


def _train_splits(data: TokenizedSplits) -> list[TokenizedDataset]:
    """The parts of the rows of `data.train`: what is trained on, and what was set aside."""
    parts = (data.train, None if data.report.validation else data.validation)
    return [rows for rows in parts if rows is not None and len(rows)]


def _contradictory_pairs(data: TokenizedSplits) -> DataIssue:
    """Pairs that stand in the data the other way round too."""
    parts = _train_splits(data)
    units_of = contradictory_pairs(parts)
    locations = [location for rows, units in zip(parts, units_of, strict=True) for location in _locations(rows, units)]
    return DataIssue(
        "contradicting: the same answers also occur the other way round",
        sum(map(len, units_of)),
        "kept; together they teach nothing",
        tuple(locations[:EXAMPLES]),
    )


def _split_overlap(data: TokenizedSplits) -> tuple[str, ...]:
    if data.validation is None or not data.report.shared:
        return ()
    return _locations(data.validation, np.flatnonzero(np.isin(data.validation.unit_hashes, data.train.unit_hashes)))


def _heldout_leakage(
    rows: TokenizedDataset,
    stats: TokenStats,
    template: ChatTemplate,
    heldout: Sequence[Prompt],
) -> DataIssue:
    """Training rows that begin with a held-out question: its answer was seen."""
    prompt_ids = heldout_ids(heldout, template)
    # Rows whose prompt is as long as one of these, before any is looked at; both sides of a pair have the same.
    likely = np.flatnonzero(np.isin(stats.prompt, list({len(ids) for ids in prompt_ids})))
    matching = [row for row in likely if tuple(map(int, rows[int(row)].input_ids[: stats.prompt[row]])) in prompt_ids]
    leaked = _units(np.array(matching, dtype=np.int64), rows)
    return DataIssue("asking a held-out question", len(leaked), LEAKAGE_NOTE, _locations(rows, leaked))


def _eos_stats(stats: TokenStats, template: ChatTemplate, rows_per_unit: int) -> EosStats:
    unended = stats.unended.reshape(-1, rows_per_unit).sum(axis=1)
    tokens = {template.decode([token], special_tokens=True): count for token, count in sorted(stats.eos_counts.items())}
    return EosStats(bool(stats.eos_counts), tokens, int((unended == 0).sum()), len(unended))


def _examples(rows: TokenizedDataset, template: ChatTemplate) -> list[Example]:
    """The first row or pair of each source, then those that follow in the first one."""
    names = ("",) if rows.rows_per_unit == 1 else (", chosen", ", rejected")
    return [
        Example(
            rows.row_location(row) + name,
            int(rows.lengths[row]),
            rows.num_trained_tokens(row),
            _segments(rows, row, template),
        )
        for unit in example_rows(rows.unit_source_of)
        for row, name in enumerate(names, start=unit * rows.rows_per_unit)
    ]


def _segments(rows: TokenizedDataset, number: int, template: ChatTemplate) -> tuple[tuple[bool, str], ...]:
    row = rows[number]
    left = SHOWN_CHARACTERS
    edges = [
        0,
        *(int(edge) + 1 for edge in np.flatnonzero(np.diff(np.asarray(row.completion_mask, dtype=np.int8)))),
        len(row.input_ids),
    ]
    segments: list[tuple[bool, str]] = []
    for start, end in zip(edges, edges[1:], strict=False):
        text = template.decode([int(token) for token in row.input_ids[start:end]], special_tokens=True)
        segments.append((bool(row.completion_mask[start]), truncate_middle(text, left)))
        left = max(200, left - len(text))
    return tuple(segments)


def _fatal_problems(recipe: RecipeConfig, data: TokenizedSplits, eos_stats: EosStats) -> list[str]:
    faults = invalid_sources(data.report, recipe)
    if data.report.train_rows and not eos_stats.trained:
        faults.append(
            "no end token is trained: the model would never learn to stop; the chat template closes no answer with one"
        )
    return faults
