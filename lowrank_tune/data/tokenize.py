"""From sources to a token store: a few hundred rows at a time, and stored in a cache whose key follows from their
contents."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from lowrank_tune.config import DataConfig, SourceConfig
from lowrank_tune.data.encode import SourceContext, encode_chunk
from lowrank_tune.data.formats import InvalidRow, RawRow, detect_format
from lowrank_tune.data.labeled_rows import (
    LABELED_FORMATS,
    UNPAIRED_PREFERENCE,
    detect_labeled_format,
    encode_labeled_chunk,
)
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.sources import (
    HEAD_ROWS,
    Chunk,
    LocatedRow,
    SourceRows,
    read_source,
)
from lowrank_tune.data.store_writer import Entry, StoreWriter
from lowrank_tune.data.templates.chat_template import ChatTemplate
from lowrank_tune.data.token_store import TokenizedDataset
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage, Progress, warning

VERSION = 11
"""Version of the rules that turn a row into ids, of what is reported of it, and of the arrays of a store: raise it when
they change."""
EncodeChunk = Callable[[Chunk, SourceContext], Iterator[Entry | Sequence[Entry] | InvalidRow]]
"""Yields for every row of a chunk what it becomes, or its fault."""
CHUNK = 512
"""Rows at a time: as Python numbers, long rows take a hundred times the space that they take on disk."""


def tokenize(
    sources: Sequence[SourceConfig],
    data: DataConfig,
    template: ChatTemplate,
    seed: int,
    emit: Emit,
    cache: Path | None = None,
    raise_on_invalid: bool = True,
    pairs: bool = False,
    labels: bool = False,
) -> TokenizedDataset:
    """Returns the tokenized rows of these sources, with `pairs` their preference pairs, or with `labels` their answers
    with a label.

    Raises UserError if too many rows of a source cannot be used, unless `raise_on_invalid` is false.
    """
    opened = [read_source(source, seed) for source in sources]
    formats = [
        format_of(
            source,
            rows,
            pairs,
            labels,
            accepts_text=True,
        )
        for source, rows in zip(sources, opened, strict=True)
    ]
    folder = (cache or cache_folder()) / _cache_key(
        sources,
        formats,
        opened,
        data,
        template,
        pairs,
        labels,
    )
    store = TokenizedDataset.open(folder)
    if store is None:
        with StoreWriter(folder, rows_per_unit=2 if pairs else 1) as writer:
            tokenizer = _SourceTokenizer(writer, emit, labels)
            for source, format_name, rows in zip(sources, formats, opened, strict=True):
                report = SourceReport(rows.name, format_name, weight=source.weight)
                context = SourceContext(
                    source,
                    data,
                    template,
                    report,
                )
                tokenizer.add(rows, context)
            store = writer.finish(list(tokenizer.files), tokenizer.reports)
    for source, report in zip(sources, store.reports, strict=True):
        if raise_on_invalid:
            report.check(data.max_invalid_fraction)
        emit(LogMessage(message=f"{report.name}: {report.read} rows in format `{report.format}`"))
        warn_about_missing_rows(source, report, emit)
        _warn_about_thinking(report, data, template, emit)
    return store


def cache_folder() -> Path:
    """Returns the folder of the stores. Raises UserError without a home folder."""
    named = os.environ.get("LOWRANK_TUNE_CACHE")
    try:
        if named:
            return Path(named).expanduser()
        return Path.home() / ".cache" / "lowrank_tune"
    except RuntimeError as error:
        raise UserError("there is no home folder for the cache; name a folder in LOWRANK_TUNE_CACHE") from error


class NamedRows(Protocol):
    """Rows with the name of their source, which may be iterated repeatedly."""

    @property
    def name(self) -> str: ...
    def __iter__(self) -> Iterator[LocatedRow]: ...


def format_of(
    source: SourceConfig,
    rows: NamedRows,
    pairs: bool | None = None,
    labels: bool = False,
    accepts_text: bool = False,
) -> str:
    """Returns the format that the recipe names, or that of the first row that has one. Raises UserError.

    `pairs`: whether it must be `preference` or must not; None for any format. With `labels` it is that of rows with a
    label, or of pairs, from which such rows are made; without, a label is not read. Plain text only with
    `accepts_text`.
    """
    format_name: str = source.format
    if labels:
        return _labeled_format(source, rows)
    if format_name == UNPAIRED_PREFERENCE:
        format_name = "auto"
    if format_name == "auto":

        def detect(row: RawRow) -> str:
            return detect_format(row, source.columns, bool(pairs))

        format_name = _detect_format(rows, detect)
    if pairs is False and format_name == "preference":
        raise UserError(
            f"{rows.name}: these rows are preference pairs; `algorithm: reward` and `algorithm: dpo` learn from them"
        )
    if pairs and format_name != "preference":
        raise UserError(
            f"{rows.name}: `format: {format_name}` has no preference pairs, which `algorithm: reward` and "
            f"`algorithm: dpo` learn from; "
            "leave `format` out, or write `format: preference`"
        )
    if format_name == "text" and not accepts_text:
        raise UserError(
            f"{rows.name}: these rows are plain text (`format: text`), without questions and answers; only "
            "`data.train` and `data.validation` of `algorithm: sft` may have them"
        )
    return format_name


def _labeled_format(source: SourceConfig, rows: NamedRows) -> str:
    """Returns the format of rows with a label, or `preference`."""
    if source.format in LABELED_FORMATS:
        return source.format
    if source.format != "auto":
        raise UserError(
            f"{rows.name}: `format: {source.format}` has no labels, which `algorithm: kto` learns from; leave `format` "
            f"out, or write `format: {UNPAIRED_PREFERENCE}`"
        )

    def detect(row: RawRow) -> str:
        return detect_labeled_format(row, source.columns)

    return _detect_format(rows, detect)


def _detect_format(rows: NamedRows, detect: Callable[[RawRow], str]) -> str:
    """Returns what `detect` returns for the first row for which it raises no UserError."""
    first_error: UserError | None = None
    for _, row in islice(rows, HEAD_ROWS):
        if isinstance(row, InvalidRow):
            continue
        try:
            return detect(row)
        except UserError as error:
            # One row may lack a column. If no row has a known format, the first error is raised.
            first_error = first_error or error
    if first_error is not None:
        raise UserError(f"{rows.name}: {first_error}") from first_error
    raise UserError(
        f"{rows.name}: none of its first rows is a JSON object; expected one object a line, or an array of objects"
    )


def _cache_key(
    sources: Sequence[SourceConfig],
    formats: Sequence[str],
    opened: Sequence[SourceRows],
    data: DataConfig,
    template: ChatTemplate,
    pairs: bool,
    labels: bool,
) -> str:
    """Returns a hash of everything that the store depends on."""
    source_parts = []
    for source, format_name, rows in zip(sources, formats, opened, strict=True):
        settings = [
            source.columns,
            source.ground_truth,
            source.final_answer,
            source.score_margin_scale,
        ]
        source_parts.append(
            [
                rows.content_key(),
                format_name,
                *settings,
            ]
        )
    rows_per_unit = 2 if pairs else 1
    limits = [
        data.max_length,
        data.truncation,
        data.system_prompt,
    ]
    parts = [
        VERSION,
        template.fingerprint,
        template.text_delimiters if "text" in formats else None,
        *limits,
        rows_per_unit,
        labels,
        source_parts,
    ]
    described = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(described.encode("utf-8", "replace"), digest_size=16).hexdigest()


class _SourceTokenizer:
    """Writes sources to a store, one after the other. `files` numbers the files that rows come from."""

    def __init__(
        self,
        writer: StoreWriter,
        emit: Emit,
        labels: bool,
    ) -> None:
        self.reports: list[SourceReport] = []
        self.files: dict[str, int] = {}
        self._writer = writer
        self._emit = emit
        self._encode_chunk: EncodeChunk = encode_labeled_chunk if labels else encode_chunk

    def add(
        self,
        rows: SourceRows,
        context: SourceContext,
    ) -> None:
        """Tokenizes the rows of a source."""
        report = context.report
        label = f"tokenizing {rows.name}"
        # An array: the hashes of millions of rows as a list would take several times the space.
        row_hashes = array("Q")
        self._emit(
            Progress(
                description=label,
                done=0,
                total=len(rows),
            )
        )
        for chunk, total in chunks(rows, report):
            row_hashes.extend(self._add_chunk(chunk, context))
            self._emit(
                Progress(
                    description=label,
                    done=report.read,
                    total=total,
                )
            )
        assert report.used + report.num_dropped == report.read
        if row_hashes:
            report.duplicates = len(row_hashes) - len(np.unique(np.frombuffer(row_hashes, dtype=np.uint64)))
        self.reports.append(report)

    def _add_chunk(
        self,
        chunk: Chunk,
        context: SourceContext,
    ) -> list[int]:
        """Writes and counts the rows of a chunk. Returns the hashes of those that are used."""
        report = context.report
        report.read += len(chunk)
        used: list[Entry] = []
        locations: list[tuple[int, int]] = []
        for (location, _), item in zip(chunk, self._encode_chunk(chunk, context), strict=True):
            if isinstance(item, InvalidRow):
                report.count_dropped(item.reason, str(location))
                self._writer.drop(location, item.reason)
                continue
            entries = (item,) if isinstance(item, Entry) else item
            report.count_used([row for entry in entries for row in entry.rows], entries[0].ground_truth is not None)
            report.count_labels([entry.label for entry in entries])
            report.with_reasoning += any(entry.has_reasoning for entry in entries)
            report.with_tools += any(entry.has_tools for entry in entries)
            used += entries
            file_number = self.files.setdefault(location.file, len(self.files))
            locations += [(file_number, location.line)] * len(entries)
        if used:
            self._writer.add(used, len(self.reports), locations)
        return [entry.row_hash for entry in used]


def chunks(rows: SourceRows, report: SourceReport) -> Iterator[tuple[Chunk, int]]:
    """Yields the rows of a source in chunks, then others for those that could not be used; each chunk with the number
    of rows that will have been read."""
    total = 0
    for part in rows.refill_dropped(lambda: report.used):
        total += len(part)
        iterator = iter(part)
        while chunk := list(islice(iterator, CHUNK)):
            yield chunk, total


def _warn_about_thinking(
    report: SourceReport,
    data: DataConfig,
    template: ChatTemplate,
    emit: Emit,
) -> None:
    """Logs a warning if rows without reasoning are rendered by a template that lets the model think."""
    has_switch = template.lets_model_think and "/no_think" not in (data.system_prompt or "")
    if report.format == "text" or report.with_reasoning or not report.used or not has_switch:
        return
    emit(
        warning(
            f"{report.name}: no row has reasoning, and the base's chat template lets the model think before an answer: "
            "`data.chat_template_kwargs={enable_thinking: false}` trains and uses it without"
        )
    )


def warn_about_missing_rows(
    source: SourceConfig,
    report: SourceReport,
    emit: Emit,
) -> None:
    """Logs a warning if fewer rows can be used than the recipe requests."""
    if source.max_samples is None or report.used >= source.max_samples:
        return
    emit(
        warning(
            f"{report.name}: the recipe sets {source.max_samples:,} rows, and {report.used:,} of the {report.read:,} "
            "that there are can be used"
        )
    )
