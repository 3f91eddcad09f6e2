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
MAX_EMPTY_THOUGHT = 32
"""Tokens of an empty thought between a prompt and its answer, at most."""
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
    stats = compute_token_stats(data.train, template.end_ids | set(template.text_delimiters[1]))
    eos_stats = _eos_stats(stats, template, data.train)
    parts, epoch = _mixture(recipe, data, stats)
    faults = invalid_sources(data.report, recipe)
    if data.report.train_rows and not eos_stats.trained and not data.train.is_document.all():
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
        examples=tuple(_examples(data.documents, template)),
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
    trained = train.sum_units(stats.trained)
    units = Units(
        train.unit_source_of,
        train.unit_lengths,
        trained,
        data.documents.unit_source_of,
    )
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
    if has_pairs or data.train.is_labeled:
        truncated = "too long, without the oldest turns of the prompt"
    truncated_locations = first_few(location for source in sources for location in source.truncated_locations)
    num_truncated = sum(source.truncated for source in sources)
    # A document ends where it ends, and only its last piece with an end token.
    unended_answers = np.where(data.train.is_document, 0, stats.unended)
    unended = np.flatnonzero(data.train.sum_units(unended_answers))
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
    if data.train.is_document.any():
        issues.append(_cut_documents(data.documents))
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
    first_rows = rows.unit_starts[units[:EXAMPLES]].tolist()
    return tuple(rows.row_location(row) for row in first_rows)


def _cut_documents(rows: TokenizedDataset) -> DataIssue:
    """Returns the documents to train on that are several rows."""
    is_cut = rows.is_document[rows.unit_starts[:-1]] & (np.diff(rows.unit_starts) > 1)
    cut = np.flatnonzero(is_cut)
    return DataIssue(
        "too long, cut into rows of data.max_length",
        len(cut),
        "kept, no token is lost",
        _locations(rows, cut),
    )


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
    parts = [data.documents]
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
        is_shared = np.isin(data.validation.unit_hashes, data.documents.unit_hashes)
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
    # Only rows that can begin with a held-out prompt are read; both rows of a pair have the same prompt. Between the
    # prompt and what is trained there may be an empty thought.
    lengths = np.array([-MAX_EMPTY_THOUGHT, *sorted({len(ids) for ids in prompt_ids})], dtype=np.int64)
    longest_fitting = lengths[np.searchsorted(lengths, stats.prompt, side="right") - 1]
    matching = []
    for row in np.flatnonzero(longest_fitting >= stats.prompt - MAX_EMPTY_THOUGHT).tolist():
        length = int(stats.prompt[row])
        ids = tuple(map(int, rows[row].input_ids[:length]))
        possible = lengths[(lengths <= length) & (lengths >= length - MAX_EMPTY_THOUGHT)]
        if any(ids[:end] in prompt_ids for end in possible.tolist()):
            matching.append(row)
    leaked = np.unique(rows.units_of(np.array(matching, dtype=np.int64)))
    return DataIssue(
        LEAKAGE,
        len(leaked),
        LEAKAGE_NOTE,
        _locations(rows, leaked),
    )


def _eos_stats(
    stats: TokenStats,
    template: ChatTemplate,
    train: TokenizedDataset,
) -> EosStats:
    unended = train.sum_units(stats.unended)[~train.is_document[train.unit_starts[:-1]]]
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
    """Returns the first row or pair of each source, then those that follow in the first source; of conversations that
    are several rows, all of them."""
    examples = []
    for unit in example_rows(rows.unit_source_of):
        numbers = rows.rows_of(np.array([unit])).tolist()
        for row, note in zip(numbers, _row_notes(len(numbers), _has_pairs(rows)), strict=True):
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


def _row_notes(count: int, is_pair: bool) -> list[str]:
    """Returns what distinguishes the rows of a unit, after their location."""
    if is_pair:
        return [", chosen", ", rejected"]
    if count == 1:
        return [""]
    return [f", row {number} of {count}" for number in range(1, count + 1)]


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
