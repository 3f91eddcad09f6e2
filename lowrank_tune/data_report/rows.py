"""The report of rows and of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import (
    ChatTemplate,
    Prompt,
    TokenizedDataset,
    TokenizedSplits,
    TokenStats,
    compute_token_stats,
)
from lowrank_tune.data.preference_pairs import EQUAL_ANSWERS
from lowrank_tune.data.report import EXAMPLES
from lowrank_tune.data.sampler import row_sampler
from lowrank_tune.data.stats import contradictory_pairs, pair_balance
from lowrank_tune.data.token_store import NO_LABEL, IntArray
from lowrank_tune.data_report.common import (
    LEAKAGE,
    LEAKAGE_NOTE,
    SHOWN_CHARACTERS,
    Units,
    can_be_drawn,
    dropped_rows,
    example_rows,
    first_few,
    heldout_ids,
    invalid_sources,
    lengths_of,
    mixture_of,
    truncate_middle,
    weighted_by,
)
from lowrank_tune.data_report.labels import contradictory_labels, label_balance
from lowrank_tune.data_report.report import (
    DataIssue,
    DataReport,
    EosStats,
    Epoch,
    Example,
    MixturePart,
)

MIN_SHOWN_CHARACTERS = 200
"""Characters that are shown of a segment at least, after others used up `SHOWN_CHARACTERS`."""
LABEL_NOTES = {NO_LABEL: "", 1: ", desirable", 0: ", undesirable"}
"""What is written behind the location of an example."""
NO_EOS = "no end token is trained: the model would never learn to stop; the chat template closes no answer with one"


def report_rows(
    recipe: RecipeConfig,
    data: TokenizedSplits,
    template: ChatTemplate,
    heldout: Sequence[Prompt] = (),
) -> DataReport:
    """Returns the report of loaded rows."""
    stats = compute_token_stats(data.train, template.end_ids)
    eos_stats = _eos_stats(stats, template, data.train.rows_per_unit)
    parts, epoch = _mixture(recipe, data, stats)
    faults = invalid_sources(data.report, recipe)
    if data.report.train_rows and not eos_stats.trained:
        faults.append(NO_EOS)
    return DataReport(
        report=data.report,
        template=template.describe(),
        weighted_by=weighted_by(recipe.data.train),
        parts=parts,
        lengths=lengths_of(_all_lengths(data), data.report, recipe.data.max_length),
        issues=tuple(
            _issues(
                data,
                stats,
                template,
                heldout,
            )
        ),
        ends=eos_stats,
        epoch=epoch,
        examples=tuple(_examples(data.train, template)),
        faults=tuple(faults),
        sides=pair_balance(data.train, stats) if _has_pairs(data.train) else None,
        labels=label_balance(recipe, data.train, stats) if recipe.uses_labels else None,
    )


def _has_pairs(rows: TokenizedDataset) -> bool:
    return rows.rows_per_unit > 1


def _mixture(
    recipe: RecipeConfig,
    data: TokenizedSplits,
    stats: TokenStats,
) -> tuple[tuple[MixturePart, ...], Epoch]:
    train = data.train
    trained = stats.trained.reshape(-1, train.rows_per_unit).sum(axis=1)
    units = Units(train.unit_source_of, train.unit_lengths, trained)
    sampler = None
    if can_be_drawn(units, recipe):
        sampler = row_sampler(
            train,
            recipe.data,
            recipe.train,
            recipe.seed,
        )
    return mixture_of(
        recipe,
        data.report.train,
        units,
        sampler,
    )


def _all_lengths(data: TokenizedSplits) -> IntArray:
    if data.validation is None:
        return data.train.lengths
    return np.concatenate([data.train.lengths, data.validation.lengths])


def _issues(
    data: TokenizedSplits,
    stats: TokenStats,
    template: ChatTemplate,
    heldout: Sequence[Prompt],
) -> list[DataIssue]:
    """Returns every kind of issue, even if no row has it."""
    has_pairs = _has_pairs(data.train)
    sources = (*data.report.train, *data.report.validation)
    kinds = ["too long", "without a target"]
    truncated = "too long, shortened to whole turns"
    if has_pairs:
        kinds.append(EQUAL_ANSWERS)
        truncated = "too long, without the oldest turns of the prompt"
    truncated_locations = first_few(location for source in sources for location in source.truncated_locations)
    num_truncated = sum(source.truncated for source in sources)
    unended = _units(np.flatnonzero(stats.unended), data.train)
    unended_locations = _locations(data.train, unended)
    issues = dropped_rows(sources, kinds)
    issues.append(
        DataIssue(
            truncated,
            num_truncated,
            "kept, shortened",
            truncated_locations,
        )
    )
    issues.append(
        DataIssue(
            "without an end token behind an answer",
            len(unended),
            "kept",
            unended_locations,
        )
    )
    issues.append(_duplicates(data))
    if has_pairs:
        issues.append(_contradictory_pairs(data))
    if data.train.is_labeled:
        issues.append(_contradictory_labels(data))
    issues.append(_split_overlap(data))
    if heldout:
        issues.append(
            _heldout_leakage(
                data.train,
                stats,
                template,
                heldout,
            )
        )
    return issues


def _locations(rows: TokenizedDataset, units: IntArray) -> tuple[str, ...]:
    """Returns the locations of the first few of these units."""
    first_rows = (units[:EXAMPLES] * rows.rows_per_unit).tolist()
    return tuple(rows.row_location(row) for row in first_rows)


def _units(rows: IntArray, store: TokenizedDataset) -> IntArray:
    """Returns the units that these rows belong to."""
    return np.unique(rows // store.rows_per_unit)


def _duplicates(data: TokenizedSplits) -> DataIssue:
    """Returns the equal conversations among the rows of `data.train`, with those held out for validation."""
    locations: list[str] = []
    for rows in _train_splits(data):
        hashes = rows.unit_hashes
        # Stable, so that of equal units the first one comes first.
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        repeats = order[1:][ordered[1:] == ordered[:-1]]
        locations += _locations(rows, np.sort(repeats))
    description = f"repeating an earlier {data.report.unit}"
    return DataIssue(
        description,
        data.report.duplicates,
        "kept",
        first_few(locations),
    )


def _train_splits(data: TokenizedSplits) -> list[TokenizedDataset]:
    """Returns the parts of the rows of `data.train`: those trained on, and those held out."""
    parts = [data.train]
    if data.validation is not None and not data.report.validation:
        parts.append(data.validation)
    return [rows for rows in parts if len(rows)]


def _contradictory_pairs(data: TokenizedSplits) -> DataIssue:
    """Returns the pairs that the data also contain with the answers exchanged."""
    count = 0
    locations: list[str] = []
    parts = _train_splits(data)
    for rows, units in zip(parts, contradictory_pairs(parts), strict=True):
        count += len(units)
        locations += _locations(rows, units)
    description = "contradicting: the same answers also occur the other way round"
    return DataIssue(
        description,
        count,
        "kept; together they give no signal",
        first_few(locations),
    )


def _contradictory_labels(data: TokenizedSplits) -> DataIssue:
    """Returns the rows whose conversation occurs with both labels."""
    count = 0
    locations: list[str] = []
    parts = _train_splits(data)
    for rows, contradictory in zip(parts, contradictory_labels(parts), strict=True):
        count += len(contradictory)
        locations += _locations(rows, contradictory)
    return DataIssue(
        "contradicting: the same conversation has both labels",
        count,
        "kept; together they give no signal",
        first_few(locations),
    )


def _split_overlap(data: TokenizedSplits) -> DataIssue:
    locations: tuple[str, ...] = ()
    if data.validation is not None and data.report.shared:
        is_shared = np.isin(data.validation.unit_hashes, data.train.unit_hashes)
        locations = _locations(data.validation, np.flatnonzero(is_shared))
    return DataIssue(
        "in both splits",
        data.report.shared,
        "kept in both; the validation loss will be too low",
        locations,
    )


def _heldout_leakage(
    rows: TokenizedDataset,
    stats: TokenStats,
    template: ChatTemplate,
    heldout: Sequence[Prompt],
) -> DataIssue:
    """Returns the training rows that begin with a held-out question, so that the model may see its answer."""
    prompt_ids = heldout_ids(heldout, template)
    # Only rows whose prompt has the length of a held-out one are read; both rows of a pair have the same prompt.
    lengths = {len(ids) for ids in prompt_ids}
    candidates = np.flatnonzero(np.isin(stats.prompt, list(lengths)))
    matching = []
    for row in candidates.tolist():
        ids = rows[row].input_ids[: stats.prompt[row]]
        if tuple(map(int, ids)) in prompt_ids:
            matching.append(row)
    leaked = _units(np.array(matching, dtype=np.int64), rows)
    return DataIssue(
        LEAKAGE,
        len(leaked),
        LEAKAGE_NOTE,
        _locations(rows, leaked),
    )


def _eos_stats(
    stats: TokenStats,
    template: ChatTemplate,
    rows_per_unit: int,
) -> EosStats:
    unended = stats.unended.reshape(-1, rows_per_unit).sum(axis=1)
    tokens: dict[str, int] = {}
    for token_id, count in sorted(stats.eos_counts.items()):
        tokens[template.decode([token_id], special_tokens=True)] = count
    return EosStats(
        bool(tokens),
        tokens,
        int((unended == 0).sum()),
        len(unended),
    )


def _examples(rows: TokenizedDataset, template: ChatTemplate) -> list[Example]:
    """Returns the first row or pair of each source, then those that follow in the first source."""
    notes = (", chosen", ", rejected") if _has_pairs(rows) else ("",)
    examples = []
    for unit in example_rows(rows.unit_source_of):
        for row, note in enumerate(notes, start=unit * rows.rows_per_unit):
            location = rows.row_location(row) + note + LABEL_NOTES[int(rows.labels[row])]
            segments = _segments(rows, row, template)
            examples.append(
                Example(
                    location,
                    int(rows.lengths[row]),
                    rows.num_trained_tokens(row),
                    segments,
                )
            )
    return examples


def _segments(
    rows: TokenizedDataset,
    index: int,
    template: ChatTemplate,
) -> tuple[tuple[bool, str], ...]:
    """Returns the text of a row in stretches that are trained as a whole or not at all."""
    row = rows[index]
    mask = np.asarray(row.completion_mask, dtype=np.int8)
    changes = np.flatnonzero(np.diff(mask)) + 1
    edges = [0, *changes.tolist(), len(mask)]
    segments: list[tuple[bool, str]] = []
    num_characters = SHOWN_CHARACTERS
    for start, end in zip(edges, edges[1:], strict=False):
        text = template.decode([int(token) for token in row.input_ids[start:end]], special_tokens=True)
        segments.append((bool(mask[start]), truncate_middle(text, num_characters)))
        num_characters = max(MIN_SHOWN_CHARACTERS, num_characters - len(text))
    return tuple(segments)
